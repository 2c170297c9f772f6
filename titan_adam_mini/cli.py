"""The command `titan-adam-mini`: its own flags, and any of torchtitan's as `--section.key value`.

Help and wrong flags are answered without torch, whose imports take seconds: a command's module has its flags, and
imports what does the work once they are known to be right. torchtitan is imported in another process only, which ends
before the work begins: what a command needs of it is small, and its imports take half a gigabyte.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command: the module in this package and the class that has its flags, what it does, how it is configured.

    `config`: "positional" if the configuration may be its first argument, "flag" if it is --job.config_file alone; both
    take torchtitan's flags. "" for a command that has neither.
    """

    module: str
    flags: str
    summary: str
    config: str = "positional"


COMMANDS = {
    "plan": Command(
        "memory.plan",
        "Plan",
        "Show the exact memory of every rank of a run, and whether AdamMini is worth it; needs no GPU.",
    ),
    "estimate": Command(
        "memory.estimate",
        "Estimate",
        "Simulate the peak memory of a training step by category, AdamW beside AdamMini, without hardware.",
    ),
    "snapshot": Command(
        "memory.snapshot_command",
        "SnapshotCommand",
        "Show memory in use at the peak and at the end of one or two memory snapshots, by category, side by side.",
        config="",
    ),
    "convert": Command(
        "convert.command",
        "Convert",
        "Convert a checkpoint of torchtitan between AdamW and AdamMini, into a new folder.",
        config="flag",
    ),
    "inspect": Command(
        "inspect.command",
        "Inspect",
        "Show where one second moment per block loses information, and which blocks would lose less.",
    ),
    "bench": Command(
        "bench.command",
        "Bench",
        "Show step time and state of AdamW, AdamMini and their peers side by side, on the tensors of one rank.",
    ),
    "compare": Command(
        "compare.command",
        "Compare",
        "Train with AdamW and AdamMini from the same weights on the same data, and report whether their losses differ.",
    ),
    "check": Command(
        "check.command",
        "CheckCommand",
        "Check AdamMini on the GPUs of this machine, stage by stage, without a network: PASS, FAIL or SKIPPED.",
        config="",
    ),
}

_EXTRA = ("torchtitan", "triton", "tomli")
"""Modules that only the extra `titan` brings."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments` (the process's own by default).

    Exits with status 1 and a sentence if it cannot be done, 2 if the command line is wrong, 130 on an interrupt.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] not in COMMANDS:
        asked = words in (["--help"], ["-h"])
        if words and not asked:
            print(f"titan-adam-mini: there is no command {words[0]!r}\n", file=sys.stderr)
        print(_usage(), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    command, rest = _parse(words[0], words[1:])
    try:
        from rich.console import Console

        command(Console(), rest)
    except (ValueError, OSError) as error:  # OSError: a full disk, a file that may not be read
        print(f"titan-adam-mini: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print(
            f"titan-adam-mini: {words[0]} needs {error.name}, which is not installed: "
            "pip install 'titan-adam-mini[titan]'",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("titan-adam-mini: stopped; nothing was left half-written", file=sys.stderr)
        sys.exit(130)


def _usage() -> str:
    return "\n".join(
        [
            "usage: titan-adam-mini COMMAND [own flags] [any of torchtitan's --section.key value]\n",
            *(f"  {name}: {command.summary}" for name, command in COMMANDS.items()),
            "\nThe configuration is --job.config_file X or CONFIG_FILE=X. titan-adam-mini COMMAND --help says more.",
        ]
    )


def _parse(name: str, words: list[str]) -> tuple[Any, list[str]]:
    """The command with its flags, and the words that are torchtitan's; ends the process if they are wrong."""
    import tyro

    about = COMMANDS[name]
    flags = getattr(import_module(f".{about.module}", __package__), about.flags)
    prog = f"titan-adam-mini {name}"
    if not about.config:
        return tyro.cli(flags, args=words, prog=prog), []
    config, own = _config_in_place(words) if about.config == "positional" else _config_first(words)
    command, rest = tyro.cli(flags, args=own, prog=prog, return_unknown_args=True)
    for word in rest:
        flag = word.partition("=")[0]
        if flag.startswith("--") and "." not in flag:
            print(
                f"{prog}: there is no flag {flag}: {prog} --help lists its own, and torchtitan's are --section.key",
                file=sys.stderr,
            )
            sys.exit(2)
    return command, [*config, *rest]


def _config_first(words: list[str]) -> tuple[list[str], list[str]]:
    """`--job.config_file X` (or the environment's CONFIG_FILE) for torchtitan, and the other words."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == "--job.config-file":
            taken = 1 if equals else 2
            value = value or "".join(words[place + 1 : place + 2])
            return ["--job.config_file", value], words[:place] + words[place + taken :]
    return (["--job.config_file", os.environ["CONFIG_FILE"]] if os.environ.get("CONFIG_FILE") else []), words


def _config_in_place(words: list[str]) -> tuple[list[str], list[str]]:
    """For a command with a CONFIG of its own: as `_config_first`, and the words with CONFIG in front, "" if none is.

    Were CONFIG left for the parser to find, the value of any of torchtitan's flags could be taken for it.
    """
    config, own = _config_first(words)
    for place, word in enumerate(own):
        if not word.startswith("-") and (place == 0 or word.endswith(".toml")):
            config, own = ["--job.config_file", word], own[:place] + own[place + 1 :]
            break
    return config, [*(config[1:] or [""]), *own]


if __name__ == "__main__":
    main()

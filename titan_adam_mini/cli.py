"""The command `titan-adam-mini`: its own flags, and any torchtitan setting as `--section.key value`.

Help and wrong flags are answered without importing torch, which takes seconds: a command's module defines its flags,
and imports everything else after they are validated. torchtitan is imported only in a separate process, which ends
before the command's work begins: commands need little from it, and its imports take half a gigabyte.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command: its module in this package, the class with its flags, a summary, and how it is configured.

    `config`: "positional" if the configuration may be the first argument, "flag" if only --job.config_file is accepted;
    both accept torchtitan's flags. "" for a command without configuration.
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
"""Modules that are installed only with the extra `titan`."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments` (by default the process's own).

    Exits with status 1 and a message if the command fails, 2 if the command line is wrong, 130 on an interrupt.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] not in COMMANDS:
        asked = words in (["--help"], ["-h"])
        if words and not asked:
            print(f"titan-adam-mini: unknown command {words[0]!r}\n", file=sys.stderr)
        print(_usage(), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    command, rest = _parse(words[0], words[1:])
    try:
        from rich.console import Console

        command(Console(), rest)
    except (ValueError, OSError) as error:  # OSError: a full disk, an unreadable file
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
        print("titan-adam-mini: interrupted; no partial files were left", file=sys.stderr)
        sys.exit(130)


def _usage() -> str:
    return "\n".join(
        [
            "usage: titan-adam-mini COMMAND [flags] [torchtitan's --section.key value]\n",
            *(f"  {name}: {command.summary}" for name, command in COMMANDS.items()),
            "\nSet the configuration with --job.config_file X or CONFIG_FILE=X. See titan-adam-mini COMMAND --help.",
        ]
    )


def _parse(name: str, words: list[str]) -> tuple[Any, list[str]]:
    """The command with its flags, and the arguments for torchtitan; exits if flags are wrong."""
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
                f"{prog}: unknown flag {flag}: see {prog} --help; torchtitan's flags are --section.key",
                file=sys.stderr,
            )
            sys.exit(2)
    return command, [*config, *rest]


def _config_first(words: list[str]) -> tuple[list[str], list[str]]:
    """`--job.config_file X` (or the environment's CONFIG_FILE) for torchtitan, and the other arguments."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == "--job.config-file":
            taken = 1 if equals else 2
            value = value or "".join(words[place + 1 : place + 2])
            return ["--job.config_file", value], words[:place] + words[place + taken :]
    return (["--job.config_file", os.environ["CONFIG_FILE"]] if os.environ.get("CONFIG_FILE") else []), words


def _config_in_place(words: list[str]) -> tuple[list[str], list[str]]:
    """For a command with a positional CONFIG: as `_config_first`, and the arguments with CONFIG, or "", in front.

    The parser itself could take the value of a torchtitan flag for CONFIG.
    """
    config, own = _config_first(words)
    for place, word in enumerate(own):
        if not word.startswith("-") and (place == 0 or word.endswith(".toml")):
            config, own = ["--job.config_file", word], own[:place] + own[place + 1 :]
            break
    return config, [*(config[1:] or [""]), *own]


if __name__ == "__main__":
    main()

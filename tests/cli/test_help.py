"""Help and wrong command lines are answered without torch; the package's names are imported when they are asked for."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from typing import Any

import pytest

import titan_adam_mini
from titan_adam_mini import cli
from titan_adam_mini.cli import COMMANDS

RUN = """
import contextlib, io, json, sys
from titan_adam_mini.cli import main

answers = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
            status = 0
        except SystemExit as error:
            status = error.code
    heavy = sorted({"torch", "torchtitan", "numpy", "rich"} & set(sys.modules))
    answers.append((status, out.getvalue(), err.getvalue(), heavy))
print(json.dumps(answers))
"""


def answers(*lines: list[str]) -> list[tuple[int, str, str, list[str]]]:
    """Of each command line: exit status, standard output and error, and the heavy modules that are imported by then.

    All in one fresh interpreter.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("CONFIG_FILE", "NGPU")}
    command = [sys.executable, "-c", RUN, json.dumps(lines)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=True).stdout)


def test_help_imports_nothing_heavy() -> None:
    (status, out, err, heavy), *each = answers(["--help"], *([name, "--help"] for name in COMMANDS))
    assert (status, err, heavy) == (0, "", [])
    assert all(f"\n  {name}: {about.summary}\n" in out for name, about in COMMANDS.items())
    for name, (status, out, err, heavy) in zip(COMMANDS, each, strict=True):
        assert (status, err, heavy) == (0, "", []), name
        assert out.startswith(f"usage: titan-adam-mini {name} ")


WRONG = [
    ([], 2, "usage: titan-adam-mini COMMAND"),
    (["estimat"], 2, "unknown command 'estimat'"),
    (["plan", "x.toml", "--ngpuu", "2"], 2, "unknown flag --ngpuu"),
    (["bench", "x.toml", "--repeats", "many"], 2, "--repeats"),
    (["convert", "outputs/step-1"], 2, "DST/step-N"),
    (["snapshot", "a.pickle", "--training.steps", "2"], 2, "--training.steps"),
    (["inspect", "x.toml", "--checkpoint"], 2, "--checkpoint"),
]


def test_wrong_command_lines_import_nothing_heavy() -> None:
    for (words, status, message), (ended, out, err, heavy) in zip(WRONG, answers(*(w for w, *_ in WRONG)), strict=True):
        assert (ended, out, heavy) == (status, "", []), words
        assert message in err and "Traceback" not in err, err


def test_flags_that_cannot_be_served_do_not_import_torch() -> None:
    lines = [["compare"], ["estimate", "no.toml", "--ngpu", "2"], ["convert", "a", "b", "--to", "adamw"]]
    for ended, out, err, heavy in answers(*lines):
        assert (ended, out, "torch" in heavy) == (1, "", False) and err.startswith("titan-adam-mini: "), err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_summary_is_the_first_line_of_the_help(command: str) -> None:
    about = COMMANDS[command]
    flags = getattr(import_module(f"titan_adam_mini.{about.module}"), about.flags)
    assert (inspect.getdoc(flags) or "").splitlines()[0] == about.summary
    assert (fields(flags)[0].name == "config") is (about.config == "positional")


def test_importing_the_package_does_not_import_torch() -> None:
    program = """
import sys, titan_adam_mini, titan_adam_mini.checkpoint, titan_adam_mini.inspect
assert "torch" not in sys.modules and "AdamMini" in dir(titan_adam_mini)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("package", ["titan_adam_mini", "titan_adam_mini.checkpoint", "titan_adam_mini.inspect"])
def test_public_names_are_those_of_their_modules(package: str) -> None:
    names: dict[str, Any] = {}
    exec(f"from {package} import *", names)
    module = import_module(package)
    assert set(module.__all__) <= names.keys()
    for name in module.__all__:
        value = names[name]
        assert getattr(module, name) is value
        if home := getattr(value, "__module__", ""):
            assert home.startswith(f"{package}.") and getattr(import_module(home), name) is value


def test_objects_are_pickled_under_their_modules_names() -> None:
    partition = titan_adam_mini.Partition.transformer(n_heads=2)
    written = pickle.dumps(partition)
    assert b"titan_adam_mini.partition" in written and pickle.loads(written) == partition


def test_a_name_that_the_package_does_not_have() -> None:
    with pytest.raises(AttributeError, match="module 'titan_adam_mini' has no attribute 'AdamMaxi'"):
        titan_adam_mini.AdamMaxi  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'AdamMaxi'"):
        exec("from titan_adam_mini import AdamMaxi")


def test_a_command_that_needs_the_extra_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parsed(module: str) -> None:
        def command(*_: object) -> None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        monkeypatch.setattr(cli, "_parse", lambda name, words: (command, []))

    parsed("torchtitan.config")
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "titan-adam-mini: plan needs torchtitan.config, which is not installed: pip install 'titan-adam-mini[titan]'\n"
    )
    parsed("a_users_own")
    with pytest.raises(ModuleNotFoundError, match="a_users_own"):
        cli.main(["plan"])

"""Which component of the package may import which: docs/architecture.md has the drawing, this holds it."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "titan_adam_mini"

CORE = ("private", "layout", "sharding", "partition", "plan", "kernels", "exchange", "optimizer")
BELOW_COMMANDS = ("files", "tools", *CORE, "checkpoint", "titan", "offline")
IMPORTS = {
    # The standard library alone.
    "files": (),
    "private": (),
    "layout": (),
    # The optimizer, from the bottom up.
    "sharding": ("private",),
    "partition": ("layout",),
    "plan": ("layout", "sharding"),
    "kernels": ("private", "layout", "sharding", "plan"),
    "exchange": CORE[:-2],
    "optimizer": ("files", *CORE[:-1]),
    # What stands on it. A framework imports no other framework.
    "checkpoint": ("files", *CORE),
    "titan": ("files", *CORE, "checkpoint"),
    "offline": ("files", *CORE, "checkpoint", "titan"),
    # The command line: no command imports another.
    "tools": ("files",),
    "cli": (),
    **dict.fromkeys(("memory", "bench", "compare", "inspect", "convert", "check"), BELOW_COMMANDS),
}
"""Component -> the components that it may import."""

MODULES = {
    "__init__": "optimizer",
    **dict.fromkeys(("arguments", "groups", "momentum", "report", "state"), "optimizer"),
    **dict.fromkeys(("lazy", "pickles"), "files"),
}
"""Module of the package's top -> its component, where that has another name."""

LIBRARIES = {
    **dict.fromkeys(("files", "layout", "partition", "plan"), ()),
    **dict.fromkeys(("private", "sharding", "exchange", "optimizer", "checkpoint"), ("torch",)),
    "kernels": ("torch", "numpy", "numba", "llvmlite", "triton"),
    "cli": ("tyro", "rich"),
    "tools": ("torch", "tyro", "matplotlib"),
    **dict.fromkeys(("bench", "inspect", "convert"), ("torch", "tyro", "rich", "matplotlib")),
    "compare": ("torch", "tyro", "rich", "matplotlib", "tensorboard", "tomli"),
    "memory": ("torch", "torchtitan", "tyro", "rich", "matplotlib"),
}
"""Component -> the libraries that it may import; any, where it is not named."""


def component(module: str) -> str:
    """Of a module such as "titan_adam_mini.kernels.cpu"."""
    name = (module.split(".")[1:] or ["__init__"])[0]
    return MODULES.get(name, name)


def imports(file: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in it."""
    parents = (PACKAGE, *file.relative_to(ROOT / PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = [*parents[: len(parents) - node.level]] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            # `from . import x` names a module where there is one.
            yield from (f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("own", IMPORTS)
def test_imports_run_down(own: str) -> None:
    wrong = []
    for file in FILES:
        parts = file.relative_to(ROOT / PACKAGE).with_suffix("").parts
        if component(".".join((PACKAGE, *parts))) != own:
            continue
        for module in imports(file):
            library = module.split(".")[0]
            if library == PACKAGE:
                if component(module) not in (own, *IMPORTS[own]):
                    wrong.append(f"{file.relative_to(ROOT)} imports {module}, of {component(module)}")
            elif own in LIBRARIES and library not in (*LIBRARIES[own], *sys.stdlib_module_names):
                wrong.append(f"{file.relative_to(ROOT)} imports {library}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_component_and_the_page_names_it() -> None:
    found = {component(".".join((PACKAGE, *file.relative_to(ROOT / PACKAGE).with_suffix("").parts))) for file in FILES}
    assert found <= set(IMPORTS)
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) >= found

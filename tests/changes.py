"""What our import and its features change in torchtitan's modules, seen by a process that has not imported them yet."""

import os
import sys
import types
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any


def attributes() -> dict[str, Any]:
    """Every attribute of torchtitan's modules and of their classes, and of torch itself, by name."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name == "torch" or name.split(".")[0] == "torchtitan":
            for key, value in list(vars(module).items()):
                if isinstance(value, types.ModuleType) and key != "device_module":
                    continue
                found[f"{name}:{key}"] = value
                if isinstance(value, type) and value.__module__ == name != "torch":
                    found |= {f"{name}:{key}.{inner}": one for inner, one in vars(value).items()}
    return found


def changed(before: dict[str, Any], act: Callable[[], Any]) -> list[str]:
    act()
    after = attributes()
    return sorted(name for name, value in before.items() if after.get(name) is not value)


def changes(pipe: Connection) -> None:
    """Send what is changed by the import, by a second one, by every feature twice, and by `log_memory`."""
    for name in list(os.environ):
        if name.startswith("TITAN_ADAM_MINI_"):
            del os.environ[name]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.argv = ["torchtitan.train"]
    import_module("torchtitan.train")
    import_module("torchtitan.models.llama3")  # holds a copy of build_optimizers before it is replaced
    import_module("torchtitan.components.validate")
    found: dict[str, list[str]] = {}
    before = attributes()
    found["import"] = changed(before, lambda: import_module("titan_adam_mini.titan"))
    ours = sys.modules["titan_adam_mini.titan"]
    found["again"] = changed(attributes(), ours.enable)
    for name in import_module("titan_adam_mini.titan.features").FEATURES:
        found[name] = changed(attributes(), lambda name=name: ours.enable(name))
        found[f"{name} again"] = changed(attributes(), lambda name=name: ours.enable(name))
    found["log_memory"] = changed(attributes(), import_module("titan_adam_mini.titan.metrics").install)
    pipe.send(found)

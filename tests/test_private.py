"""The private names of torch and torchtitan that the package uses: the installed versions have them all."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from titan_adam_mini import private

PACKAGE = Path(private.__file__).parent
PRIVATE_MODULES = r"torch\.(?:[\w.]*\._\w|_\w|testing\._internal|utils\._)"


def missing(places: dict[str, str], instances: dict[str, Any] | None = None) -> list[str]:
    """The names that are gone, each with what it was for."""
    gone = []
    for place, meaning in places.items():
        module, _, path = place.partition(":")
        owner, _, name = path.rpartition(".")
        try:
            holder: Any = import_module(module)
            holder = getattr(holder, owner) if owner else holder
            holder = instances[owner] if instances else holder
            getattr(holder, name)
        except (ImportError, AttributeError):
            gone.append(f"{place} is gone from this version: {meaning}")
    return gone


def test_torch_has_the_names() -> None:
    gone = []
    for name in private.MODULES:
        try:
            getattr(private, name)
        except ImportError as error:
            gone.append(str(error))
    assert gone == []
    assert missing(private.ATTRIBUTES) == []
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    instances = {
        "Optimizer": optimizer,
        "LRScheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        "FSDPState": import_module("torch.distributed.fsdp._fully_shard._fsdp_state").FSDPState(),
    }
    assert missing(private.SET_ON_INSTANCES, instances) == []


def test_torchtitan_has_the_names() -> None:
    pytest.importorskip("torchtitan", reason="the torchtitan adapter needs the extra: pip install -e '.[titan]'")
    from titan_adam_mini.titan import private as titan_private

    assert missing(titan_private.ATTRIBUTES) == []
    assert "float8" not in titan_private.model_converters() or titan_private.model_converters()["float8"]


def test_a_name_that_is_gone_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(private.MODULES, "_get_nothing", "torch._utils")
    with pytest.raises(ImportError, match=r"torch [\d.]+\S* has no torch\._utils\._get_nothing, which titan-adam-mini"):
        private._get_nothing  # noqa: B018
    place = "torch.distributed.tensor:DTensor._soul"
    assert missing({place: "a guess"}) == [f"{place} is gone from this version: a guess"]
    with pytest.raises(AttributeError):
        private.no_name  # noqa: B018


def test_no_other_file_imports_private_names_of_torch() -> None:
    """Neither from a private module of torch nor with a leading underscore."""
    pattern = re.compile(
        rf"^\s*from (?:{PRIVATE_MODULES}\S* import|torch\S* import .*\b_[a-z])|^\s*import {PRIVATE_MODULES}"
    )
    found = [
        f"{file.relative_to(PACKAGE)}: {line.strip()}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for line in file.read_text().splitlines()
        if pattern.search(line) and "torchtitan" not in line
    ]
    assert found == []

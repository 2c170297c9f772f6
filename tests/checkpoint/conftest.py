"""One checkpoint of each optimizer, shared read-only by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from stored_runs import saved


@pytest.fixture(scope="session")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adamw"), "AdamW")


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mini"), "AdamMini")

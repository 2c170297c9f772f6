"""A configuration is read as the trainer reads it."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchtitan", reason="reads torchtitan's configurations: pip install -e '.[titan]'")

from titan_worker import CONFIG, call


def _flavors_read_in(folder: str) -> Any:
    from torchtitan.models.llama3 import llama3_args

    from titan_adam_mini.offline.build import configured

    os.chdir(folder)
    configured(["--job.config_file", str(CONFIG), "--experimental.custom_import", "own.flavors"], 1)
    return llama3_args["own"]


def test_a_custom_import_is_found_from_the_current_folder(tmp_path: Path) -> None:
    """As the trainer finds it, which `python -m` starts."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "flavors.py").write_text(
        "import titan_adam_mini.titan\nfrom torchtitan.models.llama3 import llama3_args\nllama3_args['own'] = 7\n"
    )
    assert call(_flavors_read_in, str(tmp_path)) == 7

"""docs/torchtitan.md: its table of settings is whole, and torchtitan takes its lines and its example for flux."""

import re
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from torchtitan.config import ConfigManager

from titan_adam_mini.titan.job_config import AdamMini

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "torchtitan.md").read_text()


def test_every_setting_is_there() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (`[^`]+`)", PAGE, re.MULTILINE)
    settings = AdamMini()
    written = {"''": '`""`', "[]": "`[]`", "{}": "`{}`", "False": "`false`"}
    want = {one.name: repr(getattr(settings, one.name)) for one in fields(AdamMini)}
    want = {name: written.get(value, f'`"{value[1:-1]}"`') for name, value in want.items()}
    assert {name: default for name, default in rows if name in want} == want


def test_the_lines_are_taken(tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    for text, ours in ((PAGE, True), (readme, True), (PAGE.partition("## Settings of AdamMini")[2], False)):
        block = text[text.index("\n    [") :].split("\n\n")[0]
        (tmp_path / "lines.toml").write_text("\n".join(line.strip() for line in block.splitlines()))
        config = ConfigManager().parse_args(["--job.config_file", str(tmp_path / "lines.toml")])
        if ours:
            assert (config.experimental.custom_import, config.optimizer.name) == ("titan_adam_mini.titan", "AdamMini")
        else:
            assert config.optimizer.adam_mini == AdamMini()


def test_the_example_for_flux_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # flux itself needs packages that are not needed here: its configuration alone is loaded.
    models = find_spec("torchtitan.models")
    assert models is not None and models.submodule_search_locations is not None
    flux = ModuleType("torchtitan.models.flux")
    flux.__path__ = [str(Path(models.submodule_search_locations[0]) / "flux")]
    monkeypatch.setitem(sys.modules, flux.__name__, flux)
    example = PAGE.partition("    from dataclasses import")[2].partition("\n\nand in the TOML")[0]
    lines = ("    from dataclasses import" + example).splitlines()
    (tmp_path / "flux_with_adam_mini.py").write_text("\n".join(line[4:] for line in lines))
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--job.custom_config_module", "flux_with_adam_mini", "--optimizer.name", "AdamMini"]
    config = ConfigManager().parse_args(
        [*words, "--optimizer.adam_mini.second_moment", "factored", "--training.img_size", "64"]
    )
    assert config.optimizer.adam_mini.second_moment == "factored" and config.optimizer.lr == 8e-4
    assert config.training.img_size == 64 and config.training.local_batch_size == 8
    for name in ("flux_with_adam_mini", "torchtitan.models.flux.job_config"):
        monkeypatch.delitem(sys.modules, name)

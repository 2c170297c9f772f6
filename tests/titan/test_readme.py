"""The README's configuration, as torchtitan reads it, and its links."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from forked import ROOT
from torchtitan.config import ConfigManager

from titan_adam_mini.titan.job_config import AdamMini

PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_configuration_is_taken_and_shows_the_defaults(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## Use it in torchtitan\n")[2].partition("\n## ")[0]
    toml = tmp_path / "readme.toml"
    toml.write_text("\n".join(line.strip() for line in section.splitlines() if line.startswith("    ")))
    read = ConfigManager().parse_args(["--job.config_file", str(toml)])
    assert read.optimizer.name == "AdamMini" and read.optimizer.adam_mini == AdamMini()
    shown = re.findall(r"^    (\w+) = ", section.partition("[optimizer.adam_mini]")[2], re.MULTILINE)
    assert sorted(shown) == sorted(field.name for field in fields(AdamMini)), "every knob"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_at_is_there(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    missing = [link for link in links if not (page.parent / link).exists()]
    # In backquotes a path begins at the repository's top, or beside the page.
    paths = re.findall(r"`((?:docs|tests|launch|train_configs|benchmarks|evidence)/[\w./-]+\.\w+)`", text)
    missing += [path for path in paths if not any((top / path).exists() for top in (ROOT, page.parent))]
    assert not missing

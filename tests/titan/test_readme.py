"""What the pages point at is there."""

import re
from pathlib import Path

import pytest
from forked import ROOT

PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_at_is_there(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    missing = [link for link in links if not (page.parent / link).exists()]
    # In backquotes a path begins at the repository's top, or beside the page.
    paths = re.findall(r"`((?:docs|tests|launch|train_configs|benchmarks|evidence)/[\w./-]+\.\w+)`", text)
    missing += [path for path in paths if not any((top / path).exists() for top in (ROOT, page.parent))]
    assert not missing

"""The texts that corpora are made of: Python's standard library, with or without its tests, and an English dictionary.

A source is a list of texts, each of them one whole file or section, in an order that looks random and is the same on
every run. Nothing occurs in it twice. Whole texts are held out, so that no piece of a file is on both sides.
"""

import gzip
import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Generated tables, and text that is no prose of programmers: they would be most of a small corpus.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings"}
_SKIPPED_FILES = {"pydoc_data/topics.py", "html/entities.py"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Source:
    """Texts, and in words what they are."""

    texts: list[str]
    title: str


def standard_library(cache: Path, *, tests: bool) -> Source:
    """The standard library's Python files; those that are not UTF-8 are left out."""
    paths = source_files(tests)
    version = sys.version.split()[0]
    tail = " and its tests" if tests else ""
    return Source(list(_different(_read(paths))), f"{len(paths)} files of Python {version}'s standard library{tail}")


def source_files(tests: bool) -> list[Path]:
    """The standard library's Python files, sorted by a hash of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = _SKIPPED_FOLDERS if tests else _SKIPPED_FOLDERS | _TEST_FOLDERS
    found = []
    for path in root.rglob("*.py"):
        inner = path.relative_to(root)
        if not skipped.intersection(inner.parts) and inner.as_posix() not in _SKIPPED_FILES:
            found.append((_hash(inner.as_posix()), path))
    if len(found) < 50:
        raise SystemExit(
            f"Only {len(found)} Python files found under {root}: the corpus is Python's standard library as source "
            "files. Use a Python that has them (a zipped or stripped one does not)."
        )
    return [path for _, path in sorted(found)]


def _read(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


# Debian's dict-gcide: the GNU Collaborative International Dictionary of English (Webster 1913 and additions), GPL-2 or
# later. Chosen because it is the one with enough sentences, definitions and quotations, for 4 million tokens in one
# file: the Debian handbook (1.0 million characters) and the King James Bible (4.3) are prose, but too short.
_PACKAGE = "dict-gcide"
_DICTIONARY = "usr/share/dictd/gcide.dict.dz"
_INSTALLED = Path("/", _DICTIONARY)
_SHORTEST_ENTRY = 100  # characters: half of the entries say only "In a humble manner" or what they are a form of


def english(cache: Path) -> Source:
    """The dictionary's entries, those whose words begin with the same three letters as one text.

    So words of one family, which explain each other in the same sentences, are held out together.
    """
    with gzip.open(_fetch(cache), "rt", encoding="utf-8", errors="replace") as file:
        dictionary = file.read()
    sections: dict[str, list[str]] = {}
    count = 0
    for entry in _different(map(plain, entries(dictionary))):
        if len(entry) >= _SHORTEST_ENTRY:
            sections.setdefault(re.sub(r"\W", "", entry)[:3].lower(), []).append(entry)
            count += 1
    texts = ("\n\n".join(sections[name]) for name in sorted(sections, key=_hash))
    title = f"{count:,} entries of the GNU Collaborative International Dictionary of English"
    return Source(list(_different(texts)), title)


def entries(dictionary: str) -> Iterator[str]:
    """A dictd file's entries: a line that is not indented starts one. Those that are no words' are left out."""
    return (entry for entry in re.split(r"\n(?=\S)", dictionary) if entry[:1].isalpha())


def plain(entry: str) -> str:
    """An entry without the marks of a dictionary: pronunciation, etymology, source, links; one line per paragraph."""
    while (inner := re.sub(r"\[[^\[\]]*\]", "", entry)) != entry:  # brackets stand in brackets
        entry = inner
    entry = re.sub(r"\\[^\\]*\\(\s*\([^()]*\))?", "", entry)
    entry = re.sub(r"[{}]", "", entry)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", entry))
    return re.sub(r" ([,.;:])", r"\1", "\n".join(paragraph for paragraph in paragraphs if paragraph))


def _fetch(cache: Path) -> Path:
    """The dictionary's file: of the installed package, or of one that apt-get downloads and dpkg-deb unpacks."""
    unpacked = cache / _DICTIONARY
    for file in (unpacked, _INSTALLED):
        if file.is_file():
            return file
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise SystemExit(
            f"The English corpus is Debian's package {_PACKAGE}, and this machine has no {missing[0]}: put the "
            f"package's file {_DICTIONARY} at {unpacked}, or take --source stdlib."
        )
    cache.mkdir(parents=True, exist_ok=True)
    _call(["apt-get", "download", _PACKAGE], cache)
    [package] = cache.glob(f"{_PACKAGE}_*.deb")
    _call(["dpkg-deb", "-x", package.name, "."], cache)
    package.unlink()
    return unpacked


def _call(command: list[str], folder: Path) -> None:
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ran.returncode != 0:
        said = (ran.stderr.strip() or "nothing").splitlines()[-1]
        raise SystemExit(
            f"The English corpus is Debian's package {_PACKAGE}, and `{' '.join(command)}` failed: {said}. "
            "Run `apt-get update` as root first, or take --source stdlib."
        )


def _different(texts: Iterable[str]) -> Iterator[str]:
    """Each text once."""
    seen = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


SOURCES: dict[str, Callable[[Path], Source]] = {
    "stdlib": partial(standard_library, tests=False),
    "stdlib+tests": partial(standard_library, tests=True),
    "english": english,
}
"""Name -> function that reads it, given a folder where it may keep what it downloads."""

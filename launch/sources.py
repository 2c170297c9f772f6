"""Sources of corpora: Python's standard library, with or without its tests, and an English dictionary.

A source is a list of texts, each a complete file or section, in a pseudo-random order that is the same on every run,
without duplicates. Complete texts are held out, so that no file contributes to both training and validation.
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

# Generated tables and non-code text, which would dominate a small corpus.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings"}
_SKIPPED_FILES = {"pydoc_data/topics.py", "html/entities.py"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Source:
    """Texts and their description."""

    texts: list[str]
    title: str


def standard_library(cache: Path, *, tests: bool) -> Source:
    """The standard library's Python files; those that are not UTF-8 are left out."""
    paths = source_files(tests)
    version = sys.version.split()[0]
    tail = " and its tests" if tests else ""
    return Source(list(_unique(_read(paths))), f"{len(paths)} files of Python {version}'s standard library{tail}")


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
            f"Only {len(found)} Python files found under {root}: the corpus is the source of Python's standard "
            "library. Use a Python that has it (a zipped or stripped one does not)."
        )
    return [path for _, path in sorted(found)]


def _read(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


# Debian's dict-gcide: the GNU Collaborative International Dictionary of English (Webster 1913 and additions), GPL-2 or
# later. Chosen because it has enough sentences (definitions and quotations) for 4 million tokens in one file: the
# Debian handbook (1.0 million characters) and the King James Bible (4.3) are prose, but too short.
_PACKAGE = "dict-gcide"
_DICTIONARY = "usr/share/dictd/gcide.dict.dz"
_INSTALLED = Path("/", _DICTIONARY)
_SHORTEST_ENTRY = 100  # characters: half of the entries are only a phrase such as "In a humble manner", or a reference


def english(cache: Path) -> Source:
    """The dictionary's entries; entries with the same first three letters are one text.

    So related words, which share sentences in their explanations, are held out together.
    """
    with gzip.open(_fetch(cache), "rt", encoding="utf-8", errors="replace") as file:
        dictionary = file.read()
    sections: dict[str, list[str]] = {}
    count = 0
    for entry in _unique(map(plain, entries(dictionary))):
        if len(entry) >= _SHORTEST_ENTRY:
            sections.setdefault(re.sub(r"\W", "", entry)[:3].lower(), []).append(entry)
            count += 1
    texts = ("\n\n".join(sections[name]) for name in sorted(sections, key=_hash))
    title = f"{count:,} entries of the GNU Collaborative International Dictionary of English"
    return Source(list(_unique(texts)), title)


def entries(dictionary: str) -> Iterator[str]:
    """A dictd file's entries: a line that is not indented starts one. Entries that are not words are skipped."""
    return (entry for entry in re.split(r"\n(?=\S)", dictionary) if entry[:1].isalpha())


def plain(entry: str) -> str:
    """An entry without pronunciation, etymology, source and links; one line per paragraph."""
    while (inner := re.sub(r"\[[^\[\]]*\]", "", entry)) != entry:  # brackets are nested
        entry = inner
    entry = re.sub(r"\\[^\\]*\\(\s*\([^()]*\))?", "", entry)
    entry = re.sub(r"[{}]", "", entry)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", entry))
    return re.sub(r" ([,.;:])", r"\1", "\n".join(paragraph for paragraph in paragraphs if paragraph))


def _fetch(cache: Path) -> Path:
    """The dictionary file, from the installed package, or downloaded with apt-get and unpacked with dpkg-deb."""
    unpacked = cache / _DICTIONARY
    for file in (unpacked, _INSTALLED):
        if file.is_file():
            return file
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise SystemExit(
            f"The English corpus is Debian's package {_PACKAGE}, but this machine has no {missing[0]}: put the "
            f"package's file {_DICTIONARY} at {unpacked}, or use --source stdlib."
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
        reason = (ran.stderr.strip() or "no error message").splitlines()[-1]
        raise SystemExit(
            f"The English corpus is Debian's package {_PACKAGE}, but `{' '.join(command)}` failed: {reason}. "
            "Run `apt-get update` as root first, or use --source stdlib."
        )


def _unique(texts: Iterable[str]) -> Iterator[str]:
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
"""Name -> function that reads the source, given a folder for downloads."""

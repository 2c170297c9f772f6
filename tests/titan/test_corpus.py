"""launch/corpus.py and launch/sources.py beyond the quickstart: the English source, vocabularies and orders."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

DICTIONARY = Path("usr/share/dictd/gcide.dict.dz")
SMALL = {"seq_len": 32, "global_batch": 4, "steps": 20, "validation": 20, "vocab_size": 300, "source": "english"}
ABSOLUTE = r"""Absolute \Ab"so*lute\ (k[o^]t), a. [L. absolutus, fr.
   {absolvere}: cf. F. absolu [or 'abs]. See {Absolve}.]
   1. Loosed from any limitation; absolute as in {absolute
      power} ; free. --Shak.
      [1913 Webster]

            To be absolute is to be    alone.     --Milton.
      [1913 Webster +PJC]
"""
PLAIN = (
    "Absolute, a. 1. Loosed from any limitation; absolute as in absolute power; free. --Shak.\n"
    "To be absolute is to be alone. --Milton."
)


def dictionary() -> str:
    """120 families of words with three entries each, one of them twice, in dictd's form."""
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(2, 9))) for _ in range(500)]
    parts = ["00-database-info\n   GCIDE\n", "=====\nBegin file 1 of 26\n"]
    for family in range(120):
        stem = "B" + chr(97 + family // 26) + chr(97 + family % 26)
        for ending in ("ate", "ed", "ing", "ing"):
            drawn.seed(f"{family}{ending}")
            parts.append(f"{stem}{ending} \\{stem}*{ending}\\, n.\n   {' '.join(drawn.choices(words, k=60))}.\n")
    return "\n".join(parts)


@pytest.fixture
def english_out(tmp_path: Path) -> Path:
    """A folder for a corpus whose package is there already."""
    file = tmp_path / "corpus" / "package" / DICTIONARY
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(dictionary().encode()))
    return tmp_path / "corpus"


def build(out: Path, **different: Any) -> str:
    import corpus

    return corpus.build(out, **{**SMALL, "ranks": [1], **different})


def documents(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "documents.jsonl").read_text().splitlines()]


def test_an_entry_is_made_plain() -> None:
    import sources

    assert [sources.plain(entry) for entry in sources.entries(f"00-database-info\n   GCIDE\n{ABSOLUTE}")] == [PLAIN]


def test_held_out_words_do_not_occur_in_training(english_out: Path) -> None:
    """Neither a document, nor an entry, nor an entry of the same family."""
    assert "from 360 entries of the GNU Collaborative" in build(english_out, steps=100)
    training, held_out = documents(english_out / "train-1"), documents(english_out / "validation")
    assert len(training) == 400 and len(held_out) == 20
    assert len({*training, *held_out}) == 420, "and none is there twice"
    families = [
        {"B" + word[1:3] for text in texts for word in text.split() if word[0] == "B" and len(word) > 4}
        for texts in (training, held_out)
    ]
    assert len(families[0]) > 50 and len(families[1]) > 5
    assert not families[0] & families[1]


def test_the_standard_library_with_and_without_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sources

    files = {f"module{number}.py": f"# {number}" for number in range(50)} | {"copy.py": "# 7"}
    for name, text in {**files, "test/test_one.py": "# test", "site-packages/other.py": "# other"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes("# é".encode("latin-1"))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    without, with_tests = (sources.SOURCES[name](tmp_path).texts for name in ("stdlib", "stdlib+tests"))
    assert sorted(without) == sorted({*files.values()}), "each text once"
    assert sorted(with_tests) == sorted({*files.values(), "# test"})
    assert without != list(dict.fromkeys(files.values())), "in an order that looks random"


def test_what_training_has_is_not_held_out(english_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that differ at their ends alone, one of them held out: the pieces that they share are training's."""
    import sources

    shared = " ".join(f"word{number}" for number in range(3000))
    texts = [f"{shared} number {number}" for number in range(10)]
    monkeypatch.setitem(sources.SOURCES, "stdlib", lambda cache: sources.Source(texts, "texts"))
    build(english_out, source="stdlib")
    training, held_out = documents(english_out / "train-1"), documents(english_out / "validation")
    assert shared.startswith("".join(training)) and len(training) == 80
    assert shared.startswith("".join([*training, *held_out])) and len(held_out) == 20


def test_orders_hold_the_same_documents(english_out: Path) -> None:
    build(english_out)
    plain = documents(english_out / "train-1")
    build(english_out, orders=3, ranks=[1, 2])
    orders = [documents(english_out / f"train-1-order-{seed}") for seed in range(3)]
    assert all(sorted(order) == sorted(plain) for order in orders)
    for one, other in ((plain, orders[0]), (orders[0], orders[1]), (orders[1], orders[2])):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10, "of 80"
    two = documents(english_out / "train-2-order-1")
    assert {*two[:2], *two[40:42]} == set(orders[1][:4]), "the first step on two ranks is that on one"


def test_the_vocabulary_is_as_large_as_asked(english_out: Path) -> None:
    assert "byte-level BPE of 300 tokens" in build(english_out)
    saved = json.loads((english_out / "tokenizer" / "tokenizer.json").read_text())
    assert len(saved["model"]["vocab"]) == 300
    assert "byte-level BPE of 280 tokens" in build(english_out, vocab_size=280), "it is built again"


def test_a_build_that_fails_leaves_no_stamp(english_out: Path) -> None:
    build(english_out)
    with pytest.raises(SystemExit, match="use fewer steps"):
        build(english_out, steps=10**6)
    assert "already built" not in build(english_out)


def tool(folder: Path, name: str, lines: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with programs, beside the system's for the scripts in it; no dictionary is installed."""
    import sources

    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sources, "_INSTALLED", tmp_path / "nowhere")
    return folder


def test_the_package_is_downloaded_once(tools: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(ABSOLUTE.encode()))
    copy = f'/bin/mkdir -p "$3/{DICTIONARY.parent}" && /bin/cp {packed} "$3/{DICTIONARY}"'
    download = f"echo >dict-gcide_1_all.deb && echo >>{tmp_path}/calls"
    tool(tools, "apt-get", f'test "$1 $2" = "download dict-gcide" && {download}')
    tool(tools, "dpkg-deb", f'test "$1 $2" = "-x dict-gcide_1_all.deb" && {copy}')
    import sources

    for _ in range(2):
        assert sources.english(tmp_path / "cache").texts == [PLAIN]
    assert (tmp_path / "calls").read_text() == "\n"
    assert os.listdir(tmp_path / "cache") == ["usr"]


def test_without_apt_it_says_what_to_do(tools: Path, english_out: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"this machine has no apt-get: put .*gcide\.dict\.dz at .*--source stdlib"):
        build(tmp_path / "other")
    assert "360 entries" in build(english_out), "a file that was put there will do"
    tool(tools, "apt-get", "echo W: first >&2; echo 'E: Unable to locate package dict-gcide' >&2; exit 100")
    tool(tools, "dpkg-deb", "exit 1")
    with pytest.raises(SystemExit, match=r"failed: E: Unable to locate package dict-gcide\. Run `apt-get update`"):
        build(tmp_path / "other")

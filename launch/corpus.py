"""Real text that every machine has: Python's standard library as a data set, and a small tokenizer trained on it.

Writes, under one folder:

    tokenizer/         a byte-level BPE tokenizer of 512 tokens, in the files torchtitan reads
    train-N/           training documents as jsonl, one folder per number of ranks N
    validation/        documents from other source files

Every document is exactly one training sequence. torchtitan gives each data-parallel rank one contiguous piece of the
data set, so the documents of `train-N` are ordered such that every optimizer step sees the same documents for every N.
"""

import argparse
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCAB_SIZE = 512
BOS, EOS = "<|begin|>", "<|end|>"
VALIDATION_SHARE = 10  # every tenth source file is held out
# Generated tables, and text that is no prose of programmers: they would be most of a small corpus.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
_SKIPPED_FILES = {"pydoc_data/topics.py", "html/entities.py"}


def source_files() -> list[Path]:
    """The standard library's Python files, in an order that looks random and is the same on every run."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        inner = path.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(inner.parts) and inner.as_posix() not in _SKIPPED_FILES:
            found.append((hashlib.sha256(inner.as_posix().encode()).hexdigest(), path))
    if len(found) < 50:
        raise SystemExit(
            f"Only {len(found)} Python files found under {root}: the corpus is Python's standard library as source "
            "files. Use a Python that has them (a zipped or stripped one does not)."
        )
    return [path for _, path in sorted(found)]


def read_texts(paths: list[Path]) -> Iterator[str]:
    """The files' texts; those that are not UTF-8 or nearly empty are left out."""
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) > 500:
            yield text


def train_tokenizer(texts: list[str], folder: Path) -> Any:
    """Train the tokenizer and write it where torchtitan's `--model.hf_assets_path` can read it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer


def cut_documents(text: str, tokenizer: Any, tokens: int) -> Iterator[str]:
    """Consecutive pieces of `text` that encode to exactly `tokens` tokens each.

    Counted are the tokens of the piece encoded by itself, as a data loader will do, which is why pieces are found by
    trying: a token that spans the end of a piece is split differently inside the file.
    """
    start = 0
    while True:
        ahead = tokenizer.encode(text[start : start + 8 * tokens])
        if len(ahead.ids) <= tokens + 8:
            return
        guess = start + ahead.offsets[tokens - 1][1]
        for end in sorted(range(guess - 24, guess + 24), key=lambda position: abs(position - guess)):
            if len(tokenizer.encode(text[start:end]).ids) == tokens:
                yield text[start:end]
                break
        else:
            end = guess
        start = end


def order_for_ranks(documents: list[str], ranks: int, local_batch: int) -> list[str]:
    """Order documents so that `ranks` contiguous pieces, read side by side, give the steps of the given order.

    Args:
        documents: in the order of the steps: the first `ranks * local_batch` of them are step 1.
        ranks: number of data-parallel ranks.
        local_batch: documents per rank and step.
    """
    steps = len(documents) // (ranks * local_batch)
    return [
        documents[(step * ranks + rank) * local_batch + item]
        for rank in range(ranks)
        for step in range(steps)
        for item in range(local_batch)
    ]


def write_jsonl(documents: list[str], folder: Path) -> None:
    """One jsonl file with a `text` field per line."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text}) + "\n")


def build(out: Path, *, seq_len: int, global_batch: int, steps: int, ranks: list[int], validation: int) -> str:
    """Build the corpus under `out`, unless it is there already; returns one line that says what it is.

    Args:
        out: folder to write to.
        seq_len: tokens per training sequence.
        global_batch: sequences per optimizer step; every number in `ranks` must divide it.
        steps: number of steps for which there must be documents.
        ranks: numbers of data-parallel ranks to write `train-N` for.
        validation: number of held-out documents.
    """
    wanted: dict[str, Any] = {
        "seq_len": seq_len,
        "global_batch": global_batch,
        "steps": steps,
        "ranks": sorted(set(ranks)),
        "validation": validation,
        "python": sys.version.split()[0],
        "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    stamp = out / "corpus.json"
    if stamp.is_file():
        made = json.loads(stamp.read_text())
        if made["wanted"] == wanted:
            return f"{made['summary']}, as built before"

    paths = source_files()
    held_out, training = paths[::VALIDATION_SHARE], [p for i, p in enumerate(paths) if i % VALIDATION_SHARE]
    training_texts = list(read_texts(training))
    tokenizer = train_tokenizer(training_texts[:400], out / "tokenizer")
    # A sequence of seq_len inputs and as many labels is seq_len + 1 tokens; the data loader adds begin and end.
    tokens = seq_len + 1 - 2
    train_documents = _interleave(training_texts, tokenizer, tokens, steps * global_batch)
    validation_documents = _interleave(list(read_texts(held_out)), tokenizer, tokens, validation)
    for count in wanted["ranks"]:
        write_jsonl(order_for_ranks(train_documents, count, global_batch // count), out / f"train-{count}")
    write_jsonl(validation_documents, out / "validation")
    summary = (
        f"{len(train_documents):,} training and {len(validation_documents):,} held-out documents of {seq_len} tokens "
        f"from {len(paths)} files of Python {wanted['python']}'s standard library; "
        f"byte-level BPE of {tokenizer.get_vocab_size():,} tokens"
    )
    stamp.write_text(json.dumps({"wanted": wanted, "summary": summary}, indent=2) + "\n")
    return summary


def _interleave(texts: list[str], tokenizer: Any, tokens: int, count: int) -> list[str]:
    """`count` documents taken from the texts in turn, so that neighbouring documents come from different files."""
    sources = [cut_documents(text, tokenizer, tokens) for text in texts]
    documents: list[str] = []
    while sources and len(documents) < count:
        alive = []
        for source in sources:
            document = next(source, None)
            if document is None:
                continue
            documents.append(document)
            alive.append(source)
            if len(documents) == count:
                break
        sources = alive
    if len(documents) < count:
        raise SystemExit(
            f"The standard library of this Python gives {len(documents)} documents of {tokens} tokens, {count} are "
            "needed: ask for fewer steps or a smaller batch."
        )
    return documents


def main() -> None:
    """Command line: build a corpus and print what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--validation", type=int, default=64)
    options = vars(parser.parse_args())
    print(build(options.pop("out"), **options))


if __name__ == "__main__":
    main()

"""A dataset of real text, and a small tokenizer trained on it: Python's standard library, or an English dictionary
downloaded with apt-get (sources.py).

Writes, under one folder:

    tokenizer/         a byte-level BPE tokenizer, in torchtitan's format
    train-N/           training documents as jsonl, one folder per number of ranks N
    train-N-order-K/   with --orders, instead: the same documents, shuffled with seed K
    validation/        documents from other source files

Every document is exactly one training sequence. torchtitan gives each data-parallel rank one contiguous piece of the
dataset, so the documents of `train-N` are ordered such that every optimizer step sees the same documents for every N.
torchtitan 0.2 reads them in file order, whatever its seed; shuffled orders are for runs with several seeds.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sources

VOCAB_SIZE = 512
BOS, EOS = "<|begin|>", "<|end|>"
VALIDATION_SHARE = 10  # every tenth source file is held out


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> Any:
    """Train a tokenizer of `vocab_size` tokens and write it where torchtitan's `--model.hf_assets_path` can read it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
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

    Tokens are counted with the piece encoded by itself, as in a data loader. Pieces are therefore found by trial: a
    token that spans the end of a piece is split differently inside the file.
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


def build(
    out: Path,
    *,
    seq_len: int,
    global_batch: int,
    steps: int,
    ranks: list[int],
    validation: int,
    source: str = "stdlib",
    vocab_size: int = VOCAB_SIZE,
    orders: int = 0,
) -> str:
    """Build the corpus under `out`, unless it exists; returns a one-line description.

    Args:
        out: folder to write to.
        seq_len: tokens per training sequence.
        global_batch: sequences per optimizer step; every number in `ranks` must divide it.
        steps: number of steps for which there must be documents.
        ranks: numbers of data-parallel ranks to write `train-N` for.
        validation: number of held-out documents.
        source: a name in `sources.SOURCES`.
        vocab_size: tokens of the tokenizer, at least 258 (256 bytes and 2 special tokens).
        orders: number of shuffled orders; 0: documents alternate between the source's texts, so that the last ones
            are from the longest texts.
    """
    scripts = (Path(__file__), Path(sources.__file__))
    wanted: dict[str, Any] = {
        "seq_len": seq_len,
        "global_batch": global_batch,
        "steps": steps,
        "ranks": sorted(set(ranks)),
        "validation": validation,
        "source": source,
        "vocab_size": vocab_size,
        "orders": orders,
        "python": sys.version.split()[0],
        "scripts": [hashlib.sha256(script.read_bytes()).hexdigest() for script in scripts],
    }
    stamp = out / "corpus.json"
    if stamp.is_file():
        made = json.loads(stamp.read_text())
        if made["wanted"] == wanted:
            return f"{made['summary']} (already built)"
        stamp.unlink()  # a failed build must not leave an earlier tokenizer under this name

    found = sources.SOURCES[source](out / "package")
    held_out = found.texts[::VALIDATION_SHARE]
    training = [text for number, text in enumerate(found.texts) if number % VALIDATION_SHARE]
    tokenizer = train_tokenizer(training[:400], vocab_size, out / "tokenizer")
    # A sequence of seq_len inputs and as many labels is seq_len + 1 tokens; the data loader adds begin and end.
    tokens = seq_len + 1 - 2
    seen: set[str] = set()
    train_documents = _interleave(training, tokenizer, tokens, steps * global_batch, seen)
    validation_documents = _interleave(held_out, tokenizer, tokens, validation, seen)
    for count in wanted["ranks"]:
        for name, documents in _orders(train_documents, orders).items():
            ordered = order_for_ranks(documents, count, global_batch // count)
            write_jsonl(ordered, out / f"train-{count}{name}")
    write_jsonl(validation_documents, out / "validation")
    summary = (
        f"{len(train_documents):,} training and {len(validation_documents):,} held-out documents of {seq_len} tokens "
        f"from {found.title}; byte-level BPE of {tokenizer.get_vocab_size():,} tokens"
    )
    stamp.write_text(json.dumps({"wanted": wanted, "summary": summary}, indent=2) + "\n")
    return summary


def _interleave(texts: list[str], tokenizer: Any, tokens: int, count: int, seen: set[str]) -> list[str]:
    """`count` documents, alternating between the texts, so that neighbouring documents come from different texts.

    Documents in `seen` are skipped, and those returned are added to it.
    """
    pieces = [cut_documents(text, tokenizer, tokens) for text in texts]
    documents: list[str] = []
    while pieces and len(documents) < count:
        alive = []
        for piece in pieces:
            document = next((found for found in piece if found not in seen), None)
            if document is None:
                continue
            documents.append(document)
            seen.add(document)
            alive.append(piece)
            if len(documents) == count:
                break
        pieces = alive
    if len(documents) < count:
        raise SystemExit(
            f"The source has only {len(documents):,} documents of {tokens} tokens, but {count:,} are needed: use fewer "
            "steps, a smaller batch or a smaller vocabulary."
        )
    return documents


def _orders(documents: list[str], orders: int) -> dict[str, list[str]]:
    """Suffix of the folder name -> documents: unshuffled, or shuffled with seeds 0 to `orders` - 1."""
    if orders == 0:
        return {"": documents}
    return {f"-order-{seed}": random.Random(seed).sample(documents, len(documents)) for seed in range(orders)}


def main() -> None:
    """Command line: build a corpus and print its description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--validation", type=int, default=64)
    parser.add_argument("--source", choices=sources.SOURCES, default="stdlib")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--orders", type=int, default=0, help="write train-N-order-0 and so on instead of train-N")
    options = vars(parser.parse_args())
    print(build(options.pop("out"), **options))


if __name__ == "__main__":
    main()

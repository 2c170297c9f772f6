"""One run of torchtitan's trainer under torchrun, and its data: the standard library's Python files."""

import importlib.util
import json
import os
import sysconfig
from pathlib import Path
from typing import Any

from ..tools.trainer import Run, RunFailed, arguments, torchrun
from .runner import execute
from .sizes import SMALL
from .stage import Context, Skip

CONFIG = Path(__file__).with_name("llama3.toml")
NEEDED = ("torchtitan", "tokenizers", "datasets", "torchdata", "tensorboard")
FEWEST_FILES = 50
"""Minimum number of Python source files; a zipped or stripped Python has none."""
FILES = 400
"""Number of files on which the tokenizer is trained."""
CHARACTERS = 4
"""More characters than a token has on average."""


def need_packages() -> None:
    """Skip if torchtitan or a package that it or the data need is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} not installed")


def train(context: Context, name: str, settings: dict[str, Any], limit: float) -> Run:
    """Run torchtitan's trainer on all ranks and wait for it.

    Args:
        context: of the stage.
        name: of the run: its log is `train/name.log`.
        settings: the trainer's, by name, such as `{"training.steps": 10, "compile.enable": True}`.
        limit: seconds after which it is stopped.

    Raises:
        RunFailed: it ended with an error, took too long, or logged no step.
    """
    out = context.out / "train"
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{name}.log"
    command = torchrun(context.ngpu, "--local-ranks-filter=0", "--role=rank", "--tee=3")
    command += arguments({"job.config_file": CONFIG, "job.dump_folder": out / name, **settings})
    status = execute(command, limit, log, environment(context))
    run = Run.load(log, context.ngpu)
    if status is None:
        raise RunFailed(f"{name} was still running after {limit:.0f} seconds and was stopped; log: {log}")
    if status != 0:
        raise RunFailed(f"{name} ended with status {status}.\n{run.error}\nlog: {log}")
    if not run.losses:
        raise RunFailed(f"{name} ended without logging a single step; log: {log}")
    return run


def measurements(run: Run) -> dict[str, Any]:
    """The measurements of a run, for the JSON."""
    return {
        "losses": list(run.losses.values()),
        "grad_norms": list(run.grad_norms.values()),
        "tokens_per_second": run.tokens_per_second,
        "peak_active_gib": run.peaks[0],
        "peak_reserved_gib": run.peaks[1],
    }


def environment(context: Context) -> dict[str, str]:
    """The environment: no network, nothing written outside the log folder, and device settings for torch."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(context.out / "huggingface"), "PYTHONUNBUFFERED": "1"}
    found.setdefault("PET_LOCAL_ADDR", "127.0.0.1")  # for torchrun, if the host name does not resolve
    if context.cuda:
        found.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    else:
        found["TITAN_ADAM_MINI_CPU"] = "1"
        found.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores; torch would give each of them all
    return found


def settings_of(context: Context, seq_len: int, steps: int) -> dict[str, Any]:
    """Settings shared by all runs; builds the data and the tokenizer if needed."""
    text = build_text(context.out / "text", CHARACTERS * context.ngpu * steps * seq_len)
    return {
        "model.hf_assets_path": text / "tokenizer",
        "training.dataset_path": text / "documents",
        "training.seq_len": seq_len,
        "training.steps": steps,
        "lr_scheduler.warmup_steps": max(1, steps // 5),
        "metrics.enable_tensorboard": False,
        "checkpoint.enable": False,
        "compile.enable": context.cuda,
        "debug.seed": 0,
    }


def build_text(folder: Path, characters: int) -> Path:
    """Source files as documents, with at least this many characters if possible, and a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    documents = folder / "documents" / "data.jsonl"
    documents.parent.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not {"site-packages", "dist-packages"} & {*path.parts}]
    if len(paths) < FEWEST_FILES:
        raise Skip(f"there are only {len(paths)} Python files under {root} to train on: use a Python with its sources")
    texts: list[str] = []
    for path in paths:
        if len(texts) >= FILES and sum(map(len, texts)) >= characters:
            break
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    begin, end = "<|begin|>", "<|end|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL.vocab,
        special_tokens=[begin, end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:FILES], trainer)
    assets = folder / "tokenizer"
    assets.mkdir(exist_ok=True)
    tokenizer.save(str(assets / "tokenizer.json"))
    config = {"bos_token": begin, "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    (assets / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder

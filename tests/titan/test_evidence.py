"""docs/evidence: its files through torchtitan's parser, what its page says of them, and the smallest trained."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ROOT, train
from torchtitan.config import ConfigManager
from torchtitan.models.llama3 import Transformer

from titan_adam_mini.titan import flavor

FOLDER = ROOT / "docs" / "evidence"
SIZES = [name.removeprefix("evidence_") for name in flavor.FLAVORS if name.startswith("evidence_")]
README = (FOLDER / "README.md").read_text()


def parse(size: str, *further: str) -> Any:
    return ConfigManager().parse_args(["--job.config_file", str(FOLDER / f"llama3_{size}.toml"), *further])


def built() -> dict[str, Any]:
    """Corpus -> options of the command that builds it, as the page has it."""
    found = {}
    for command in re.findall(r"^    python launch/corpus.py ((?:.*\\\n)*.*)", README, re.MULTILINE):
        out, *words = shlex.split(command.replace("\\\n", " "))
        found[out] = dict(zip(words[::2], words[1::2], strict=True))
    return found


def test_the_sizes_differ_in_size_and_learning_rate_alone() -> None:
    assert sorted(file.name for file in FOLDER.glob("*.toml")) == sorted(f"llama3_{size}.toml" for size in SIZES)
    texts = [(FOLDER / f"llama3_{size}.toml").read_text() for size in SIZES]
    same = {
        re.sub(r"^lr = .*", "lr", text.replace(size, "SIZE"), flags=re.MULTILINE).split("\n", 1)[1]
        for size, text in zip(SIZES, texts, strict=True)
    }
    assert len(same) == 1
    for size in SIZES:
        config = parse(size)
        assert config.model.flavor == f"evidence_{size}"
        with torch.device("meta"):
            model = Transformer(flavor.model_args(config.model.flavor))
        parameters = sum(param.numel() for param in model.parameters())
        assert f"of {parameters / 1e6:.3g}M parameters" in texts[SIZES.index(size)].split("\n")[0]
        assert re.search(rf"^\| `llama3_{size}.toml` \| {parameters:,} \|", README, re.MULTILINE)


@pytest.mark.parametrize("corpus", ["stdlib", "english"])
def test_it_reads_what_the_pages_commands_build(corpus: str) -> None:
    lines = re.findall(r"^#   (--.*)$", (FOLDER / f"llama3_{SIZES[0]}.toml").read_text(), re.MULTILINE)
    assert len(lines) == 3
    config = parse(SIZES[0], *(" ".join(lines).split() if corpus == "english" else []))
    options = built()[f".cache/evidence/{corpus}"]
    top = Path(".cache/evidence") / corpus
    assert Path(config.model.hf_assets_path) == top / "tokenizer"
    assert Path(config.training.dataset_path) == top / f"train-{options['--ranks']}-order-0"
    assert Path(config.validation.dataset_path) == top / "validation"
    assert options["--source"] == corpus and options["--vocab-size"] == "1024"
    training, validation = config.training, config.validation
    for one in (training, validation):
        assert (one.local_batch_size, one.seq_len) == (int(options["--global-batch"]), int(options["--seq-len"]))
    assert training.steps <= int(options["--steps"]), "no document is read twice"
    assert training.steps % validation.freq == 0, "torchtitan validates after the last step only then"
    assert validation.steps * validation.local_batch_size == int(options["--validation"])


@pytest.mark.slow
def test_the_smallest_trains(work: Path, corpus_dir: Path) -> None:
    """Shortened, on the corpus of these tests, whose 512 tokens are among the model's 1024."""
    settings = {
        "model.hf_assets_path": corpus_dir / "tokenizer",
        "debug.seed": 0,
        "training.dataset_path": corpus_dir / "train-1",
        "training.local_batch_size": 4,
        "training.steps": 8,
        "training.seq_len": 64,
        "lr_scheduler.warmup_steps": 2,
        "metrics.enable_tensorboard": False,
        "validation.dataset_path": corpus_dir / "validation",
        "validation.seq_len": 64,
        "validation.freq": 4,
        "validation.steps": 1,
    }
    run = train("evidence", settings, ranks=1, out=work, config=FOLDER / f"llama3_{SIZES[0]}.toml")
    assert list(run.losses) == list(range(1, 9)) and list(run.validation) == [1, 4, 8]
    assert run.validation[8] < run.validation[1] - 0.5

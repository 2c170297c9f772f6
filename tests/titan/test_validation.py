"""Validation on the same documents each time, with the feature; as torchtitan does it, without."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchtitan.components.validate as titan_validate
from forked import CONFIG, SEQ_LEN
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.config import ConfigManager

from titan_adam_mini.titan import enable


class Model(torch.nn.Module):
    """Keeps what it is given; what it answers does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def get_attention_masks(self, **_: Any) -> None:
        raise TypeError

    def forward(self, tokens: torch.Tensor, **_: Any) -> torch.Tensor:
        self.seen.append(tokens.tolist())
        return tokens.float()


def seen(corpus_dir: Path, steps: int, times: int) -> list[Any]:
    """The batches of each of several validations of `steps` batches of two; the corpus has eight documents."""
    words = ["--job.config_file", str(CONFIG), "--model.hf_assets_path", str(corpus_dir / "tokenizer")]
    words += ["--validation.dataset_path", str(corpus_dir / "validation"), "--validation.seq_len", str(SEQ_LEN)]
    config = ConfigManager().parse_args(
        [*words, "--validation.local_batch_size", "2", "--validation.steps", str(steps)]
    )
    nothing = SimpleNamespace(**dict.fromkeys(("dp_enabled", "cp_enabled", "pp_enabled", "dp_cp_enabled"), False))
    one = titan_validate.Validator(
        job_config=config,
        dp_world_size=1,
        dp_rank=0,
        tokenizer=build_hf_tokenizer(config),
        parallel_dims=nothing,
        loss_fn=lambda predictions, labels: predictions.sum(),
        validation_context=torch.no_grad,
        maybe_enable_amp=torch.no_grad(),
        metrics_processor=SimpleNamespace(ntokens_since_last_log=0, log_validation=lambda loss, step: None),
    )
    told = []
    for step in range(times):
        model = Model()
        one.validate([model], step)
        told.append(model.seen)
    return told


def test_the_same_documents_each_time(corpus_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("__init__", "validate"):  # put back after the test
        monkeypatch.setattr(titan_validate.Validator, name, getattr(titan_validate.Validator, name))
    enable("cpu")
    first, second = seen(corpus_dir, 2, 2)
    assert second[0] != first[0], "torchtitan reads on"
    enable("same_validation")
    first, second, third = seen(corpus_dir, 2, 3)
    assert first == second == third and len(first) == 2
    whole, again = seen(corpus_dir, -1, 2)
    assert whole == again and len(whole) == 4 and whole[:2] == first

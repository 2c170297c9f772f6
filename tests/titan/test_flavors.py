"""The flavours that are added to torchtitan's Llama 3 table: their sizes, their rotary frequencies, and one trained."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ROOT, said, train
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, llama3_args

from titan_adam_mini import Partition
from titan_adam_mini.titan import flavor

# Flavour -> parameters, neurons of the MLP, rows of a head.
LLAMA2 = {
    "llama2_39M": (38_738_304, 1024, 64),
    "llama2_67M": (66_857_472, 1536, 64),
    "llama2_102M": (101_924_480, 1792, 64),
    "llama2_162M": (162_423_552, 2048, 64),
    "llama2_271M": (271_090_688, 2816, 64),
    "llama2_1B": (1_055_991_808, 5632, 128),
    "llama2_7B": (6_738_415_616, 11008, 128),
    "llama2_13B": (13_015_864_320, 13824, 128),
}

# The same, and rows of a key or value matrix: two sizes have fewer of them than of queries.
EVIDENCE = {
    "evidence_1M": (1_066_112, 352, 32, 128),
    "evidence_4M": (4_213_504, 704, 32, 128),
    "evidence_12M": (11_802_240, 1024, 64, 128),
}


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return Transformer(flavor.model_args(name))


def test_every_flavor_is_listed() -> None:
    assert set(flavor.FLAVORS) == {"adam_mini_debug", *EVIDENCE, *LLAMA2} <= set(llama3_args)


@pytest.mark.parametrize("name", LLAMA2)
def test_sizes(name: str) -> None:
    """Counts are exact and round to the size in the name, embedding and output included."""
    parameters, hidden, head_dim = LLAMA2[name]
    model = on_meta(name)
    assert sum(param.numel() for param in model.parameters()) == parameters
    assert model.layers["0"].feed_forward.w1.weight.shape == (hidden, model.model_args.dim)
    args = model.model_args
    assert args.dim == args.n_heads * head_dim == args.n_kv_heads * head_dim
    unit = {"M": 10**6, "B": 10**9}[name[-1]]
    assert round(parameters / unit) == int(re.findall(r"_(\d+)", name)[0])


@pytest.mark.parametrize("name", EVIDENCE)
def test_sizes_of_the_evidence(name: str) -> None:
    parameters, hidden, head_dim, kv_rows = EVIDENCE[name]
    model = on_meta(name)
    args = model.model_args
    assert sum(param.numel() for param in model.parameters()) == parameters
    assert round(parameters / 10**6) == int(name.removeprefix("evidence_").removesuffix("M"))
    assert model.layers["0"].feed_forward.w1.weight.shape == (hidden, args.dim)
    assert model.layers["0"].attention.wk.weight.shape == (kv_rows, args.dim)
    assert args.dim == args.n_heads * head_dim and kv_rows == args.n_kv_heads * head_dim
    assert model.output.weight.shape == model.tok_embeddings.weight.shape == (1024, args.dim)


@pytest.mark.parametrize("name", LLAMA2)
@pytest.mark.parametrize("value_blocks", ["neuron", "tensor"])
def test_second_moments(name: str, value_blocks: str) -> None:
    """As many as the paper's rules give: per token, head, neuron and norm."""
    model = on_meta(name)
    args, hidden = model.model_args, LLAMA2[name][1]
    shapes = {key: tuple(param.shape) for key, param in model.named_parameters()}
    blocks = Partition.from_config(args, value_blocks=value_blocks).assign(shapes).values()
    values = args.dim if value_blocks == "neuron" else 1
    layer = 2 * args.n_heads + values + args.dim + 2 * hidden + args.dim + 2
    assert sum(one.layout.num_blocks for one in blocks) == 2 * 32000 + args.n_layers * layer + 1


@pytest.mark.parametrize("name", LLAMA2)
def test_rotary_frequencies_are_not_stretched(name: str) -> None:
    """torchtitan's default stretches them as Llama 3.1 does: at the end of 4096 tokens the angles are others."""
    args = flavor.model_args(name)
    width = args.dim // args.n_heads
    args.n_layers, args.vocab_size, args.dim, args.n_heads, args.n_kv_heads = 1, 8, width, 1, 1
    angles = torch.outer(torch.arange(4096), 1 / 10000 ** (torch.arange(0, width, 2).float() / width))
    want = torch.polar(torch.ones_like(angles), angles)
    assert torch.equal(Transformer(args).freqs_cis, want)
    args.rope_scaling_args = TransformerModelArgs().rope_scaling_args
    assert not torch.allclose(Transformer(args).freqs_cis, want)


def test_arguments_are_new_each_time() -> None:
    first, second = flavor.model_args("llama2_7B"), flavor.model_args("llama2_7B")
    first.max_seq_len, first.rope_scaling_args.scaling_factor = 7, 8.0
    assert (second.max_seq_len, second.rope_scaling_args.scaling_factor) == (4096, 1.0)
    assert flavor.model_args("llama2_7B") == second
    assert llama3_args["llama2_7B"].rope_scaling_args is not llama3_args["llama2_13B"].rope_scaling_args


def test_a_users_own_entry_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TransformerModelArgs(dim=64)
    monkeypatch.setitem(llama3_args, "llama2_7B", own)
    monkeypatch.delitem(llama3_args, "llama2_13B")
    flavor.add()
    assert llama3_args["llama2_7B"] is own
    assert llama3_args["llama2_13B"] == flavor.model_args("llama2_13B")


@pytest.mark.slow
def test_the_smallest_trains(work: Path, corpus_dir: Path) -> None:
    """llama2_scaling_law.toml through torchtitan's trainer on one rank, its data and batch in small."""
    settings = {
        "model.hf_assets_path": corpus_dir / "tokenizer",
        "metrics.log_freq": 1,
        "metrics.enable_tensorboard": False,
        "debug.seed": 0,
        "optimizer.lr": 4e-3,
        "lr_scheduler.warmup_steps": 0,
        "training.dataset": "c4_test",
        "training.dataset_path": corpus_dir / "train-1",
        "training.local_batch_size": 1,
        "training.global_batch_size": 1,
        "training.seq_len": 64,
        "training.steps": 2,
        "training.mixed_precision_param": "float32",
        "validation.enable": False,
    }
    config = ROOT / "train_configs" / "llama2_scaling_law.toml"
    run = train("llama2_39M", settings, ranks=1, out=work, config=config)
    assert said(run, r"total\s+75\s+([\d,]+)") == "89,713", "AdamMini's table"
    assert list(run.losses) == [1, 2]
    assert abs(run.losses[1] - math.log(32000)) < 1, "of a model that knows nothing"
    assert run.losses[2] < run.losses[1] - 0.1, "and of one that has learnt which tokens there are"

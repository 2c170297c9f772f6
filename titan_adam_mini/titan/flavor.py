"""Additional flavors of torchtitan 0.2's ``[model] name = "llama3"``: the Llama 2 sizes of the Adam-mini paper (arXiv
2406.16793), and a small debug model whose heads are cut by two FSDP shards."""

from typing import Any

# Llama 2 differs from torchtitan's Llama 3 only in sizes. torchtitan 0.2 always applies Llama 3.1's RoPE scaling, by 8
# for wavelengths of 8192 tokens or more; a factor of 1 disables it.
_LLAMA2: dict[str, Any] = {
    "vocab_size": 32000,
    "multiple_of": 256,
    "norm_eps": 1e-5,
    "rope_theta": 10000,
    "rope_scaling_args": {"scaling_factor": 1.0},
    "max_seq_len": 4096,
}

# Name -> width, layers, heads (every head has its own key and value). 7B and 13B: arXiv 2307.09288. The others, of the
# paper's scaling law: the authors' repository, zyushun/Adam-mini, examples/llama/torchtitan/models/llama/__init__.py.
# torchtitan's own older table has 271M with 8 heads, the authors' table 16. Sizes include embedding and output.
_LLAMA2_SIZES = {
    "39M": (384, 8, 6),
    "67M": (512, 10, 8),
    "102M": (640, 12, 10),
    "162M": (768, 16, 12),
    "271M": (1024, 16, 16),
    "1B": (2048, 18, 16),
    "7B": (4096, 32, 32),
    "13B": (5120, 40, 40),
}

FLAVORS: dict[str, dict[str, Any]] = {
    # 5 heads of 32 rows, so that 2, 4 or 8 shards cut heads, unlike in torchtitan's own debug model.
    "adam_mini_debug": {
        "dim": 160,
        "n_layers": 4,
        "n_heads": 5,
        "n_kv_heads": 5,
        "vocab_size": 512,
        "multiple_of": 32,
        "rope_theta": 500000,
    },
    **{
        f"llama2_{size}": {**_LLAMA2, "dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": heads}
        for size, (dim, layers, heads) in _LLAMA2_SIZES.items()
    },
}
"""Flavor -> arguments of torchtitan's ``TransformerModelArgs``, with ``rope_scaling_args`` as a nested dict."""


def model_args(name: str) -> Any:
    """New arguments of the flavor `name`; torchtitan modifies them (sequence length), so they are not shared."""
    from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs

    arguments = dict(FLAVORS[name])
    scaling = RoPEScalingArgs(**arguments.pop("rope_scaling_args", {}))
    return TransformerModelArgs(**arguments, rope_scaling_args=scaling)


def add() -> None:
    """Add the flavors to torchtitan's Llama 3 table; existing entries of the same name are kept."""
    from torchtitan.models.llama3 import llama3_args

    for name in FLAVORS:
        llama3_args.setdefault(name, model_args(name))

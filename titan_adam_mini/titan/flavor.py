"""A small Llama 3 of our own for debugging: its heads are cut by two FSDP shards, which torchtitan's own are not."""

from typing import Any

NAME = "adam_mini_debug"


def debug_args() -> Any:
    """Arguments of the model: 5 heads of 32 rows, so that 2, 4 or 8 shards cut heads; a 512-token vocabulary."""
    from torchtitan.models.llama3 import TransformerModelArgs

    return TransformerModelArgs(
        dim=160, n_layers=4, n_heads=5, n_kv_heads=5, vocab_size=512, multiple_of=32, rope_theta=500000
    )


def add() -> None:
    """Add the flavour to torchtitan's Llama 3 table, as ``[model] name = "llama3", flavor = "adam_mini_debug"``."""
    from torchtitan.models.llama3 import llama3_args

    llama3_args.setdefault(NAME, debug_args())

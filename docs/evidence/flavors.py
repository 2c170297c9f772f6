"""Three sizes of Llama 3 that a CPU trains in minutes: the custom import of this folder's configurations.

They name it `docs.evidence.flavors`, which Python finds where a command is started from the repository's top, as those
of README.md are; from elsewhere put that folder on PYTHONPATH.
"""

from torchtitan.models.llama3 import llama3_args
from torchtitan.models.llama3.model.args import TransformerModelArgs

import titan_adam_mini.titan  # noqa: F401

SIZES = {"1M": (128, 4, 4, 4), "4M": (256, 5, 8, 4), "12M": (384, 7, 6, 2)}
"""Name -> width, layers, heads, key and value heads, each counted with embedding and output of 1024 tokens."""

for name, (dim, layers, heads, kv_heads) in SIZES.items():
    llama3_args[f"evidence_{name}"] = TransformerModelArgs(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        vocab_size=1024,
        multiple_of=32,
        rope_theta=500000,
    )

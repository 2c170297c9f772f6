"""Llama 3 in sizes from half a billion to 8 billion parameters, and which of them a device can train with AdamW."""

import math
from dataclasses import dataclass

VOCAB = 128256
ADAMW = 16
"""Bytes per parameter: fp32 weight, gradient and two moments."""
SHARE = 0.9
"""Share of a device's memory that the estimate may use."""


@dataclass(frozen=True)
class Size:
    """Sizes as in torchtitan's Llama 3; attention heads have `dim / heads` rows."""

    name: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    multiplier: float
    multiple: int
    vocab: int = VOCAB

    @property
    def hidden(self) -> int:
        """The MLP's size, as torchtitan computes it."""
        return self.multiple * math.ceil(int(self.multiplier * int(8 * self.dim / 3)) / self.multiple)

    @property
    def parameters(self) -> int:
        """Number of parameters, norms left out."""
        attention = 2 * self.dim * self.dim * (1 + self.kv_heads / self.heads)
        return int(2 * self.vocab * self.dim + self.layers * (attention + 3 * self.dim * self.hidden))

    def bytes(self, ranks: int, tokens: int) -> float:
        """An upper estimate of the memory of one of `ranks` FSDP ranks with AdamW and `tokens` tokens per rank.

        On one rank, where torchtitan does not shard, autocast keeps a bf16 copy of the weights; FSDP gathers the
        embedding and the output, in bf16 with fp32 gradients. Activations without checkpointing.
        """
        copies = 2 * self.parameters if ranks == 1 else 6 * 2 * self.vocab * self.dim
        return ADAMW * self.parameters / ranks + copies + tokens * (34 * self.layers * self.dim + 14 * self.vocab)


SIZES = (
    Size("8B", 4096, 32, 32, 8, 1.3, 1024),
    Size("3B", 3072, 28, 24, 8, 1.0, 256),
    Size("2B", 2560, 20, 20, 4, 1.0, 256),
    Size("1B", 2048, 16, 32, 8, 1.5, 256),
    Size("0.5B", 1024, 16, 16, 8, 1.0, 256),
)
"""Largest first."""
SMALL = Size("small", 160, 4, 5, 5, 1.0, 32, vocab=512)
"""For a CPU: five heads of 32 rows, which two ranks cut."""


def fitting(free: int, ranks: int, tokens: int) -> list[Size]:
    """The sizes that fit into `free` bytes, largest first; always includes the smallest."""
    return [size for size in SIZES[:-1] if size.bytes(ranks, tokens) < SHARE * free] + [SIZES[-1]]

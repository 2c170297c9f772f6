"""A small GPT-2 with the names and shapes that Hugging Face's has: `Conv1D` weights are stored [in, out]."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

CONFIG = SimpleNamespace(n_embd=24, n_head=4, n_layer=2, vocab_size=40, n_positions=16)


class Conv1D(nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(3 * dim, dim), Conv1D(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            one.unflatten(-1, (CONFIG.n_head, -1)).transpose(1, 2) for one in self.c_attn(x).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(4 * dim, dim), Conv1D(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x)))


class Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(dim), Attention(dim), nn.LayerNorm(dim), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """`lm_head` is tied to `wte`."""

    def __init__(self) -> None:
        super().__init__()
        dim = CONFIG.n_embd
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(CONFIG.vocab_size, dim),
                "wpe": nn.Embedding(CONFIG.n_positions, dim),
                "h": nn.ModuleList(Layer(dim) for _ in range(CONFIG.n_layer)),
                "ln_f": nn.LayerNorm(dim),
            }
        )
        self.lm_head = nn.Linear(dim, CONFIG.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"].weight[: tokens.shape[1]]
        for layer in self.transformer["h"]:
            x = layer(x)
        return self.lm_head(self.transformer["ln_f"](x))


def trained(steps: int) -> tuple[GPT2, torch.optim.AdamW]:
    """After some steps of AdamW on words of which few are frequent, each followed by its double."""
    torch.manual_seed(0)
    model = GPT2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for _ in range(steps):
        frequent = torch.distributions.Exponential(0.3).sample((8, 1)).long()
        tokens = (frequent + torch.arange(CONFIG.n_positions)).remainder(CONFIG.vocab_size)
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), (2 * tokens % CONFIG.vocab_size).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, optimizer

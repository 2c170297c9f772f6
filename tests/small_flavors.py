"""A custom import of torchtitan: ours, and tiny models whose sizes fit no number of ranks.

- llama3 nasty: a vocabulary of 5 (four ranks: one has nothing), 343 hidden rows, heads of 32 rows that three ranks cut
- llama3 odd: a vocabulary of 7, and hidden rows that tensor parallelism of 2 cuts evenly, while FSDP2 does not
- llama3 even: what tensor parallelism of 2 cuts into whole runs of 128 columns
- llama3 shallow: one layer, for what is costly to simulate; two_layers: two, whose heads tensor parallelism of 2 cuts
- llama3 8B_short: 4 of the layers of torchtitan's 8B
- qwen3 nasty_moe: 6 experts of 20 rows
- mystery, frozen: llama3 with a parameter that no rule knows; with an embedding that is not trained
"""

import dataclasses
from typing import Any

import torch
import torchtitan.models.llama3 as llama3
import torchtitan.models.qwen3 as qwen3
from torchtitan.models.llama3.model.args import TransformerModelArgs
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3.model.args import Qwen3ModelArgs
from torchtitan.protocols.train_spec import register_train_spec

import titan_adam_mini.titan  # noqa: F401

llama3.llama3_args["nasty"] = TransformerModelArgs(
    dim=128, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=5, multiple_of=7
)
llama3.llama3_args["odd"] = TransformerModelArgs(
    dim=128, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=7, multiple_of=18
)
llama3.llama3_args["even"] = TransformerModelArgs(
    dim=256, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=32, multiple_of=256
)
llama3.llama3_args["shallow"] = TransformerModelArgs(
    dim=128, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=32, multiple_of=128
)
llama3.llama3_args["two_layers"] = TransformerModelArgs(
    dim=256, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=512, multiple_of=128
)
llama3.llama3_args["8B_short"] = dataclasses.replace(llama3.llama3_args["8B"], n_layers=4)
qwen3.qwen3_args["nasty_moe"] = Qwen3ModelArgs(
    vocab_size=37,
    head_dim=32,
    dim=128,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    qk_norm=True,
    hidden_dim=96,
    moe_enabled=True,
    moe_inter_dim=20,
    moe_args=MoEArgs(num_experts=6, num_shared_experts=1, top_k=2, score_func="softmax", use_grouped_mm=False),
)


class Mystery(llama3.Transformer):
    """A Llama 3 with a parameter of unknown purpose."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.mystery = torch.nn.Parameter(torch.empty(3, 4))


class Frozen(llama3.Transformer):
    """A Llama 3 whose embedding is not trained."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.tok_embeddings.weight.requires_grad_(False)


for name, model in (("mystery", Mystery), ("frozen", Frozen)):
    register_train_spec(name, dataclasses.replace(llama3.get_train_spec(), model_cls=model))

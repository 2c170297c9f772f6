"""A custom import of torchtitan: ours, and a Llama 3 flavour large enough for a checkpoint of over 2 GB."""

import torchtitan.models.llama3 as llama3
from torchtitan.models.llama3.model.args import TransformerModelArgs

import titan_adam_mini.titan  # noqa: F401

llama3.llama3_args["wide"] = TransformerModelArgs(dim=1024, n_layers=10, n_heads=8, n_kv_heads=2, vocab_size=32000)

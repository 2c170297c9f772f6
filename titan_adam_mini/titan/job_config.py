"""The settings of ``[optimizer.adam_mini]`` for torchtitan 0.2, merged into its job config by one line:
``[job] custom_config_module = "titan_adam_mini.titan.job_config"``.

Without that line all settings have their defaults and ``[optimizer.adam_mini]`` must be absent. torchtitan merges
dataclasses by their field types, so annotations in this file must be evaluated (no ``from __future__ import
annotations``).
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.constructors import PrimitiveConstructorSpec


def _roles_from_words(words: list[str]) -> dict[str, str]:
    """`["*.adapter.weight=neuron,*.scale=norm"]` as a table; a pattern may contain an equals sign, a role may not."""
    roles = {}
    for entry in filter(None, words[0].split(",")):
        pattern, equals, role = entry.rpartition("=")
        if not (pattern and equals and role):
            raise ValueError(f"{entry!r} is not of the form pattern=role")
        roles[pattern] = role
    return roles


def _is_roles(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(word, str) for pair in value.items() for word in pair)


# By default tyro would create one flag per pattern in the TOML file, and accept no other patterns.
Roles = Annotated[
    dict[str, str],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATTERN=ROLE,...",
        instance_from_str=_roles_from_words,
        is_instance=_is_roles,
        str_from_instance=lambda roles: [",".join(f"{pattern}={role}" for pattern, role in roles.items())],
    ),
]


@dataclass
class AdamMini:
    roles: Roles = field(default_factory=dict)
    """
    Roles for parameters that are not in the built-in table, or that need other blocks: a name pattern (`*` matches
    anything) and a role. They take precedence over the built-in rules; the first match wins.
    TOML: `roles = {"*.adapter.weight" = "neuron"}`.
    Command line, replacing the TOML's: `--optimizer.adam_mini.roles "*.adapter.weight=neuron,*.scale=norm"`.
    """

    undecayed: list[str] = field(default_factory=list)
    """
    Name patterns, or names of roles, of parameters without weight decay; all others are decayed, as with torchtitan's
    AdamW. A pattern that matches no parameter is an error.
    TOML: `undecayed = ["norm", "*.bias"]`. Command line: `--optimizer.adam_mini.undecayed "norm,*.bias"`.
    """

    value_blocks: Literal["neuron", "tensor"] = "neuron"
    """
    Blocks of the value projections: "neuron", one second moment per output neuron, or "tensor", one per matrix, which
    the authors of Adam-mini recommend for runs of fewer than 10,000 to 20,000 steps.
    """

    second_moment: Literal["blocks", "channels", "factored"] = "blocks"
    """
    "blocks": one second moment per block, as in the Adam-mini paper.
    "channels": one per row of queries and keys instead of one per head, and one per column of the matrices whose output
    is added to the residual stream (wo, w2) instead of one per row; about as many as with "blocks". After SlimAdam
    (arXiv 2503.01843, table 1). Not with `value_blocks = "tensor"`.
    "factored": one per row and one per column of every matrix, multiplied, as in Adafactor (arXiv 1804.04235), with
    Adam-mini's momentum. A matrix of rows x columns then has rows + columns + 1 second moments. For single matrices:
    `roles = {"*.wv.weight" = "factored"}`.
    With all three, parameters matched by `roles` keep the blocks of the role given there.
    """

    momentum_dtype: Literal["", "float32", "bfloat16", "int8"] = ""
    """
    Dtype of the first moment. "" means the parameter's own; "int8" has one scale per 128 columns, for tensors of two or
    more dims whose columns are a multiple of 128; the others stay in float32. A checkpoint with another dtype is
    converted as it is loaded.
    """

    stochastic_rounding: bool = False
    """
    Round bfloat16 parameters up or down at random, without bias, where rounding to nearest loses small updates.
    Parameters of other types are not affected.
    """

    load_adamw_state: bool = False
    """
    Convert AdamW's state if the loaded checkpoint has it: momentum and step are kept, second moments are averaged over
    the blocks, on all ranks. While loading, a rank needs AdamW's 8 bytes per parameter. A checkpoint with AdamMini's
    state is loaded as usual. `titan-adam-mini convert` does the same outside a run.
    """

    hyper_parameters: Literal["checkpoint", "config"] = "checkpoint"
    """
    The hyper-parameters used after a checkpoint is loaded with its optimizer state: "checkpoint", those it was saved
    with, as always in torchtitan, or "config", those of this configuration (learning rate, betas, eps, weight decay).
    The schedule continues from its step.
    """

    log_memory: bool = False
    """
    Add this rank's memory to torchtitan's metrics (TensorBoard, Weights & Biases): memory/optimizer_state(GiB), its
    parts, parameters, gradients, and on a GPU memory/max_allocated(GiB), the peak since the last logged step.
    """


@dataclass
class Optimizer:
    adam_mini: AdamMini = field(default_factory=AdamMini)
    """Settings of the optimizer "AdamMini" only."""


@dataclass
class JobConfig:
    optimizer: Optimizer = field(default_factory=Optimizer)

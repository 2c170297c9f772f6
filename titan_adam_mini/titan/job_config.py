"""The knobs of ``[optimizer.adam_mini]`` for torchtitan 0.2, merged into its job config by one line:
``[job] custom_config_module = "titan_adam_mini.titan.job_config"``.

Without that line every knob has its default and ``[optimizer.adam_mini]`` must be absent. torchtitan merges dataclasses
by looking at their field types, so annotations in this file are evaluated (no ``from __future__ import annotations``).
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.constructors import PrimitiveConstructorSpec


def _roles_from_words(words: list[str]) -> dict[str, str]:
    """`["*.adapter.weight=neuron,*.scale=norm"]` as a table; the pattern may hold an equals sign, the role may not."""
    roles = {}
    for entry in filter(None, words[0].split(",")):
        pattern, equals, role = entry.rpartition("=")
        if not (pattern and equals and role):
            raise ValueError(f"{entry!r} is not of the form pattern=role")
        roles[pattern] = role
    return roles


def _is_roles(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(word, str) for pair in value.items() for word in pair)


# By itself tyro would make one flag for each pattern that the TOML file has, and take no other pattern.
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
    Roles for parameters that the built-in table does not know, or that are to be blocked otherwise: a name pattern
    (`*` matches anything) and a role. They stand before the built-in rules, the first match wins.
    TOML: `roles = {"*.adapter.weight" = "neuron"}`.
    Command line, in place of the TOML's: `--optimizer.adam_mini.roles "*.adapter.weight=neuron,*.scale=norm"`.
    """

    undecayed: list[str] = field(default_factory=list)
    """
    Name patterns, or names of roles, of parameters without weight decay; all others are decayed, as with torchtitan's
    AdamW. A pattern that matches no parameter is an error.
    TOML: `undecayed = ["norm", "*.bias"]`. Command line: `--optimizer.adam_mini.undecayed "norm,*.bias"`.
    """

    value_blocks: Literal["neuron", "tensor"] = "neuron"
    """
    Blocks of the value projections: "neuron", one second moment per output neuron, or "tensor", one for the whole
    matrix, which the authors of Adam-mini advise for runs of fewer than 10,000 to 20,000 steps.
    """

    second_moment: Literal["blocks", "channels", "factored"] = "blocks"
    """
    "blocks": one second moment per block, as in the Adam-mini paper.
    "channels": one per row of queries and keys instead of one per head, and one per column of what attention and MLPs
    add to the residual stream (wo, w2) instead of one per row; about as many as with "blocks". After SlimAdam (arXiv
    2503.01843, table 1). Not with `value_blocks = "tensor"`.
    "factored": for every matrix, one per row and one per column, multiplied, as Adafactor (arXiv 1804.04235) keeps
    them, with Adam-mini's momentum. A matrix of rows x columns then has rows + columns + 1 second moments. For single
    ones: `roles = {"*.wv.weight" = "factored"}`.
    With all three, parameters that `roles` names keep the blocks of the role given there.
    """

    momentum_dtype: Literal["", "float32", "bfloat16", "int8"] = ""
    """
    Type of the first moment. "" means the parameter's own; "int8" has one scale per 128 columns, for tensors of two
    dims or more whose columns are a multiple of 128, and leaves the others in float32. A checkpoint with another type
    is converted as it is loaded.
    """

    stochastic_rounding: bool = False
    """
    Round bfloat16 parameters up or down at random, right on average, where rounding to nearest loses small updates.
    Parameters of other types are not affected.
    """

    load_adamw_state: bool = False
    """
    Take AdamW's state where the checkpoint to be loaded holds it: momentum and step as they are, second moments
    averaged over the blocks, on all ranks at once. While loading, a rank holds AdamW's 8 bytes per parameter. A
    checkpoint with AdamMini's state is loaded as ever. `titan-adam-mini convert` does the same outside a run.
    """

    hyper_parameters: Literal["checkpoint", "config"] = "checkpoint"
    """
    Which hyper-parameters count when a checkpoint is loaded with its optimizer state: "checkpoint", those it was saved
    with, as ever in torchtitan, or "config", those of this configuration (learning rate, betas, eps, weight decay).
    The schedule goes on where it was.
    """

    log_memory: bool = False
    """
    Add what this rank holds to torchtitan's metrics (TensorBoard, Weights & Biases): memory/optimizer_state(GiB), its
    parts, parameters, gradients, and on a GPU memory/max_allocated(GiB), the peak since the last logged step.
    """


@dataclass
class Optimizer:
    adam_mini: AdamMini = field(default_factory=AdamMini)
    """Settings that only the optimizer "AdamMini" reads."""


@dataclass
class JobConfig:
    optimizer: Optimizer = field(default_factory=Optimizer)

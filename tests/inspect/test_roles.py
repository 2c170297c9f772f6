"""A table of roles reaches the parameters it is for and no other, whatever their names are."""

from __future__ import annotations

import families
import pytest
from flavours import flavours, shapes_of

from titan_adam_mini import Partition
from titan_adam_mini.inspect.estimates import CANDIDATES, DEFAULT, estimates
from titan_adam_mini.inspect.roles import roles_table
from titan_adam_mini.partition import SECOND_MOMENTS, collapse

BERT = {
    f"bert.encoder.layer.{layer}.{one}.weight": "neuron"
    for layer in range(12)
    for one in ("attention.output.dense", "intermediate.dense", "output.dense")
} | {
    "norm.weight": "norm",
    "layers.0.norm.weight": "norm",
    "layers.1.ffn.norm.weight": "norm",
    "ffn.norm.weight": "norm",
}


def check(wanted: dict[str, str], present: dict[str, str] = BERT) -> dict[str, str]:
    """The table; each parameter is given what is wanted, or has what it had."""
    table = roles_table(wanted, present)
    rules = Partition(()).with_roles({**table, "*": "tensor"})
    shapes = {name: (4, 4) if role == "neuron" else (4,) for name, role in present.items()}
    got = {name: one.role for name, one in rules.assign(shapes).items()}
    assert got == {name: wanted.get(name, present[name] if name in table else "tensor") for name in present}
    return table


def test_a_pattern_that_fits_no_other_stands_for_all_layers() -> None:
    wanted = {name: "neuron.T" for name in BERT if "intermediate" in name}
    assert check(wanted) == {"bert.encoder.layer.*.intermediate.dense.weight": "neuron.T"}


def test_a_star_does_not_run_over_dots() -> None:
    """`layer.*.output.dense` would be the output of attention too."""
    wanted = {name: "neuron.T" for name in BERT if name.endswith("output.dense.weight") and "attention" not in name}
    assert list(check(wanted)) == [f"bert.encoder.layer.{n}.output.dense.weight" for n in ("[0-9]", "[0-9][0-9]")]
    both = {name: "neuron.T" for name in BERT if name.endswith("output.dense.weight")}
    assert check(both)["bert.encoder.layer.*.attention.output.dense.weight"] == "neuron.T"


def test_some_layers_of_a_pattern_are_written_out() -> None:
    names = [f"bert.encoder.layer.{layer}.intermediate.dense.weight" for layer in (3, 11)]
    assert check(dict.fromkeys(names, "tensor")) == dict.fromkeys(names, "tensor")
    apart = check({names[0]: "tensor", names[1]: "neuron.T"})
    assert apart == {names[0]: "tensor", names[1]: "neuron.T"}


@pytest.mark.parametrize("also", [[], ["ffn.norm.weight"], ["layers.0.norm.weight", "ffn.norm.weight"]])
def test_longer_names_that_end_in_one_keep_what_they_have(also: list[str]) -> None:
    table = check({"norm.weight": "bias"} | dict.fromkeys(also, "bias"))
    assert list(table)[-1] == "norm.weight" and len(table) == 4
    assert table["layers.1.ffn.norm.weight"] == "norm", "also where ffn.norm.weight is given another role"


FAST = ("gpt_oss",)


@pytest.mark.parametrize(
    "model", [pytest.param(one, marks=() if one in FAST else pytest.mark.slow) for one in sorted(families.TITAN)]
)
def test_the_candidates_of_torchtitans_models_are_roles(model: str) -> None:
    """With every second_moment: what is measured is what the candidate's role gives, to the parameter and no other."""
    spec = flavours(model)
    small = {flavour: args for flavour, args in spec["flavours"].items() if "debug" in flavour}
    assert small
    for args in small.values():
        shapes = shapes_of(spec["model_cls"], args)
        for option in SECOND_MOMENTS:
            partition = Partition.from_config(args, second_moment=option)
            found = estimates(partition, shapes)
            present = {name: one[DEFAULT].role for name, one in found.items()}
            choices = [dict.fromkeys(shapes, candidate) for candidate in (DEFAULT, *CANDIDATES)]
            choices += [
                {name: "elementwise" for name in shapes if collapse(name) == kind}
                for kind in set(map(collapse, shapes))
            ]
            for choice in choices:
                chosen = {name: candidate for name, candidate in choice.items() if candidate in found[name]}
                table = roles_table({name: found[name][one].role for name, one in chosen.items()}, present)
                got = partition.with_roles(table).assign(shapes)
                for name in shapes:
                    want = found[name][chosen.get(name, DEFAULT)].layouts
                    assert got[name].layouts == want, (option, name, table)

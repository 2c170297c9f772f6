"""Gradients put there by hand on every mesh of the catalogue: the oracle's values, one device's bits, the exchange."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from injected import errors, on_mesh, on_one_device
from meshes import CATALOGUE

from titan_adam_mini.check.injected import oracle
from titan_adam_mini.check.meshes import DENSE
from titan_adam_mini.check.oracle import error
from titan_adam_mini.state import SECOND_MOMENTS

# Collectives of any later step, and of the first: that one also checks the plan (one per process group) and, where
# parameters are replicated on a group, agrees on which gradients are Partial (one more for that group).
COLLECTIVES = {
    "one rank": (0, 0),
    **{f"FSDP2 {n}": (1, 2) for n in (2, 3, 4, 5, 7, 8)},
    "FSDP2 2, CPU offload": (1, 2),
    **{f"HSDP {shape}": (1, 4) for shape in ("2x2", "2x3", "3x2")},
    "HSDP 2x1": (0, 2),
    **{f"TP {n}": (2, 4) for n in (2, 3, 4)},
    "TP 2, plain norms": (1, 2),
    **{f"FSDP2 x TP {shape}": (2, 5) for shape in ("2x2", "3x2", "2x3", "4x2")},
    "FSDP2 x TP 2x2, norms on dp": (2, 4),
    "HSDP x TP 2x2x2": (2, 7),
    "FSDP2 4, experts": (1, 2),
    "FSDP2 3, experts Shard(1)": (1, 2),
    "EP 2": (0, 1),
    "FSDP2 x EP 2x2": (1, 4),
    "FSDP2 x EP 3x2": (1, 4),
    "FSDP2 x EP 2x2, experts Shard(1)": (1, 4),
    "FSDP2 3, even": (1, 2),
    "FSDP2 x TP 2x2, even": (2, 5),
    "PP 2": (0, 0),
    "PP x FSDP2 2x2": (1, 2),
    "PP x FSDP2 x TP 2x2x2": (2, 5),
}
BITS = [name for name, mesh in CATALOGUE.items() if mesh.sizes == DENSE and {*mesh.axes} <= {"rep", "dp"}]
FAST = {
    *("FSDP2 7", "FSDP2 2, CPU offload", "TP 3", "FSDP2 x TP 3x2", "FSDP2 x EP 2x2"),
    *("FSDP2 3, experts Shard(1)", "PP x FSDP2 2x2"),
}
ONE_OF_EACH = {
    *("one rank", "FSDP2 5", "FSDP2 2, CPU offload", "HSDP 3x2", "TP 3", "TP 2, plain norms", "FSDP2 x TP 3x2"),
    *("FSDP2 x TP 2x2, norms on dp", "FSDP2 3, experts Shard(1)", "FSDP2 x EP 2x2, experts Shard(1)", "PP x FSDP2 2x2"),
}
SLOW = ONE_OF_EACH | {
    *("FSDP2 8", "HSDP 2x3", "HSDP x TP 2x2x2", "FSDP2 4, experts", "EP 2", "PP 2", "PP x FSDP2 x TP 2x2x2"),
}


def marked(fast: set[str], slow: set[str]) -> list[Any]:
    """The catalogue; what is neither in `fast` nor in `slow` is for the night."""

    def marks(name: str) -> Any:
        return () if name in fast else pytest.mark.slow if name in slow else pytest.mark.nightly

    return [pytest.param(name, id=name, marks=marks(name)) for name in CATALOGUE]


@pytest.mark.parametrize("name", marked(FAST, SLOW))
def test_float64_equals_the_oracle_with_the_stated_collectives(name: str) -> None:
    got, ranks = on_mesh(name)
    worst = errors(got, oracle(CATALOGUE[name].sizes))
    assert max(worst.values()) < 1e-12, worst
    later, first = COLLECTIVES[name]
    for rank, steps in enumerate(ranks):
        assert [len(steps[0]), len(steps[1])] == [first, later], (rank, steps[:2])
        assert all(step == steps[1] for step in steps[2:]), "every step asks for the same"
        assert len(steps) == 4
        assert {one.op for step in steps for one in step} <= {"allreduce_"}
        assert all(count <= 2 for count in Counter(one.ranks for one in steps[1]).values())
        assert all(rank in one.ranks for step in steps for one in step)


FACTORED = {
    **COLLECTIVES,
    # The columns of experts are cut along dp, everything else along all ranks.
    "FSDP2 x EP 2x2, experts Shard(1)": (2, 5),
}
"""The same where every matrix is factored."""


@pytest.mark.parametrize("name", marked({"FSDP2 x TP 2x2", "FSDP2 x EP 2x2, experts Shard(1)"}, ONE_OF_EACH))
def test_factored_equals_the_oracle_too(name: str) -> None:
    got, ranks = on_mesh(name, second_moment="factored")
    worst = errors(got, oracle(CATALOGUE[name].sizes, second_moment="factored"))
    assert max(worst.values()) < 1e-12, worst
    for steps in ranks:
        assert [len(steps[0]), len(steps[1])] == list(reversed(FACTORED[name]))
        assert all(count <= 2 for count in Counter(one.ranks for one in steps[1]).values())
        assert all(step == steps[1] for step in steps[2:]), "every step asks for the same"


@pytest.mark.parametrize("name", marked({"TP 3", "FSDP2 x TP 2x2"}, ONE_OF_EACH))
def test_channels_equal_the_oracle_too(name: str) -> None:
    got, ranks = on_mesh(name, second_moment="channels")
    worst = errors(got, oracle(CATALOGUE[name].sizes, second_moment="channels"))
    assert max(worst.values()) < 1e-12, worst
    for steps in ranks:
        # Along TP neither rows of w1 nor columns of w2 are cut: where that is the only axis, only norms are sent.
        assert len(steps[1]) <= FACTORED[name][0] and all(step == steps[1] for step in steps[2:])
        assert all(count <= 2 for count in Counter(one.ranks for one in steps[1]).values())


SLOW_BITS = ["FSDP2 2, CPU offload", "FSDP2 7", "FSDP2 8", "HSDP 3x2"]


@pytest.mark.parametrize(
    ("dtype", "second_moment", "names"),
    [
        (torch.float32, "factored", ["HSDP 2x3"]),
        pytest.param(torch.bfloat16, "channels", ["FSDP2 3"], marks=pytest.mark.slow),
        pytest.param(torch.float32, "factored", SLOW_BITS, marks=pytest.mark.slow),
        pytest.param(torch.float32, "channels", ["FSDP2 8"], marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "factored", ["HSDP 2x3"], marks=pytest.mark.slow),
        pytest.param(torch.float32, "factored", BITS, marks=pytest.mark.nightly),
        pytest.param(torch.float32, "channels", BITS, marks=pytest.mark.nightly),
    ],
)
def test_columns_have_the_bits_of_one_device_under_fsdp_and_hsdp(
    dtype: torch.dtype, second_moment: str, names: list[str]
) -> None:
    want = on_one_device(DENSE, dtype=dtype, steps=6, second_moment=second_moment)
    for name in names:
        got, _ = on_mesh(name, dtype=dtype, steps=6, second_moment=second_moment)
        for kind in ("params", "exp_avg", *SECOND_MOMENTS):
            for key, value in want[kind].items():
                assert got[kind][key].dtype == value.dtype and torch.equal(got[kind][key], value), (name, kind, key)


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.bfloat16, ["FSDP2 3"]),
        pytest.param(torch.bfloat16, ["HSDP 2x3"], marks=pytest.mark.slow),
        pytest.param(torch.float32, SLOW_BITS, marks=pytest.mark.slow),
        pytest.param(torch.float32, BITS, marks=pytest.mark.nightly),
        pytest.param(torch.float64, ["FSDP2 3", "HSDP 2x3"], marks=pytest.mark.slow),
    ],
)
def test_fsdp_and_hsdp_of_any_size_have_the_bits_of_one_device(dtype: torch.dtype, names: list[str]) -> None:
    want = on_one_device(DENSE, dtype=dtype, steps=6)
    assert want["exp_avg_sq"]["norm.weight"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name in names:
        got, _ = on_mesh(name, dtype=dtype, steps=6)
        for kind in ("params", "exp_avg", "exp_avg_sq"):
            for key, value in want[kind].items():
                assert got[kind][key].dtype == value.dtype and torch.equal(got[kind][key], value), (name, kind, key)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum_dtype": torch.bfloat16, "maximize": True},
        pytest.param({"foreach": True}, marks=pytest.mark.slow),
        pytest.param({"foreach": False}, marks=pytest.mark.slow),
    ],
)
def test_options_do_not_change_that(options: dict[str, object]) -> None:
    want, default = (on_one_device(DENSE, dtype=torch.float32, steps=6, **given) for given in (options, {}))
    got, _ = on_mesh("HSDP 2x3", dtype=torch.float32, steps=6, **options)
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(got[kind][key], value) for key, value in want[kind].items()), kind
    if "foreach" in options:  # each engine has bits of its own, the same on every mesh
        for key, value in default["params"].items():
            torch.testing.assert_close(want["params"][key], value, rtol=1e-5, atol=1e-7)
    else:
        same = all(torch.equal(want["params"][key], value) for key, value in default["params"].items())
        assert not same, "the option matters"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FSDP2 x EP 2x2", "FSDP2 x TP 3x2"])
def test_the_test_bed_with_adamw_as_a_control(name: str) -> None:
    """torch's AdamW gives the same on every mesh and on one device: places, gradients and gathering are right."""
    got, _ = on_mesh(name, "AdamW", steps=4)
    want = on_one_device(CATALOGUE[name].sizes, "AdamW", steps=4)
    assert max(error(got["params"][key], value) for key, value in want["params"].items()) < 1e-13

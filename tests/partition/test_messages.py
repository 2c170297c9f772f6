"""What errors advise: roles only where the shape allows them; and what shows that a matrix is stored [in, out]."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_adam_mini.partition import Partition
from titan_adam_mini.partition.messages import proposal


@given(st.lists(st.integers(0, 5), max_size=7).map(tuple), st.sampled_from(["mixer.weight", "x", "attn.to_k.weight"]))
def test_a_role_that_is_proposed_fits_the_shape(shape: tuple[int, ...], name: str) -> None:
    if role := proposal(name, shape):
        assert Partition.transformer(roles={name: role}).assign({name: shape})


@pytest.mark.parametrize(
    ("shapes", "proposed"),
    [
        ({"layers.0.cell.weight": (4, 6, 5)}, '"layers.*.cell.weight": "..."'),
        ({"attn.to_k.weight": (4, 4)}, '"attn.to_k.weight": "..."'),
        ({"attn.in_proj_qkvz.weight": (4, 4)}, '"attn.in_proj_qkvz.weight": "..."'),
        ({"cells.0.gain": (4,), "cells.1.gain": (4, 4)}, '"cells.*.gain": "..."'),
        ({"stem.weight": (4, 3, 2, 2)}, '"stem.weight": "convolution"'),
    ],
)
def test_no_role_is_proposed_where_several_are_likely(shapes: dict[str, tuple[int, ...]], proposed: str) -> None:
    with pytest.raises(ValueError) as caught:
        Partition.transformer().assign(shapes)
    assert f"roles={{{proposed}}}" in str(caught.value)
    assert ("cannot be inferred" in str(caught.value)) == ("..." in proposed)


@pytest.mark.parametrize("shape", [(2048,), (0,), ()])
def test_a_slice_of_a_matrix_is_called_a_slice_and_gets_no_role(shape: tuple[int, ...]) -> None:
    names = ["layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w2.weight"]
    with pytest.raises(ValueError) as caught:
        Partition.transformer(n_heads=2).assign(dict.fromkeys(names, shape) | {"norm.weight": (8,), "odd": (3,)})
    text = str(caught.value)
    assert text.startswith("3 parameters with the name of a matrix (role query for layers.0.attention.wq.weight)")
    assert "flattened slices" in text and "fully_shard" in text
    assert "roles" not in text and '"norm"' not in text
    with pytest.raises(ValueError, match=r"exactly 2 dims, but this one has 1, perhaps a flattened slice"):
        Partition.transformer(roles={"mixer.weight": "neuron"}).assign({"mixer.weight": (5,)})


# [out, in] or [in, out]


def gpt2(transposed: bool, bias: bool, without: str = "-") -> dict[str, tuple[int, ...]]:
    sizes = {"attn.c_attn": (24, 8), "attn.c_proj": (8, 8), "mlp.c_fc": (32, 8), "mlp.c_proj": (8, 32)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        shapes[f"h.0.{name}.weight"] = size[::-1] if transposed else size
        shapes |= {f"h.0.{name}.bias": size[:1]} if bias else {}
    return {name: shape for name, shape in shapes.items() if without not in name}


@pytest.mark.parametrize("transposed", [False, True])
def test_gpt2_without_its_attention_is_oriented_by_the_biases(transposed: bool) -> None:
    want = Partition.transformer(n_heads=2).assign(gpt2(transposed, True))
    for absent in ("c_attn", "attn.", "mlp.c_proj"):
        got = Partition.transformer(n_heads=2).assign(gpt2(transposed, True, absent))
        assert got == {name: want[name] for name in got}
        assert any(one.role == "neuron" + ".T" * transposed for one in got.values())


def test_frozen_parameters_tell_the_orientation_and_match_patterns() -> None:
    shapes = gpt2(True, False)
    frozen = {"h.0.attn.c_attn.weight": shapes.pop("h.0.attn.c_attn.weight"), "adapter.scale": (3, 1, 4)}
    partition = Partition.transformer(n_heads=2, roles={"c_attn.weight": "qkv.T"}, undecayed=["adapter.*"])
    got = partition.assign(shapes, others=frozen)
    assert list(got) == list(shapes), "others need no role and get no blocks"
    assert {one.role for one in got.values()} == {"neuron.T"}
    with pytest.raises(ValueError, match=r"'c_attn\.weight' matches no parameter"):
        partition.assign(shapes)


@pytest.mark.parametrize("name", ["h.0.mlp.c_fc.weight", "h.0.attn.c_proj.weight"])
def test_an_orientation_left_open_asks_for_the_frozen_parameters(name: str) -> None:
    alone = {name: gpt2(True, False)[name]}
    with pytest.raises(ValueError, match=r"pass all named parameters .*, frozen ones too .* 'neuron', or 'neuron\.T'"):
        Partition.transformer(n_heads=2).assign(alone, partial=True)
    square = gpt2(True, True)
    alone = {known: square[known] for known in ("h.0.attn.c_proj.weight", "h.0.attn.c_proj.bias")}
    with pytest.raises(ValueError, match="pass all named parameters"):  # 8 x 8 with a bias of 8 says nothing
        Partition.transformer(n_heads=2).assign(alone)


def test_experts_without_their_pair() -> None:
    up = {"mlp.experts.gate_up_proj": (2, 5, 6)}
    with pytest.raises(ValueError, match=r"mlp\.experts\.down_proj, whose shape shows which, was not given: pass all"):
        Partition.transformer().assign(up)
    got = Partition.transformer().assign(up | {"mlp.experts.gate_up_proj_bias": (2, 6)})
    assert got["mlp.experts.gate_up_proj"].role == "experts.T"

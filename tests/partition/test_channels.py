"""second_moment="channels": one second moment per index of the dim that is not the residual stream's."""

import families
import pytest

from titan_adam_mini.layout import BlockLayout
from titan_adam_mini.partition import Partition
from titan_adam_mini.partition.rules import TRANSFORMER, WRITES

WIDTH = 48
TABLES = {name: table for source in (families.HUGGING_FACE, families.OTHERS) for name, (_, table) in source.items()}


def shapes_of(table: dict[str, families.Row]) -> dict[str, tuple[int, ...]]:
    return {name.replace("*", "0"): shape for name, (shape, _, _) in table.items()}


def whole_dims(layout: BlockLayout) -> list[int]:
    return [dim for dim, tiles in enumerate(layout.dims) if tiles.is_whole and tiles.size > 1]


@pytest.mark.parametrize("family", sorted(TABLES))
def test_blocks_lie_along_the_residual_stream(family: str) -> None:
    """Whatever the family calls its matrices and whichever way round it stores them; no heads are needed."""
    for name, blocks in Partition.transformer(second_moment="channels").assign(shapes_of(TABLES[family])).items():
        if blocks.role in ("norm", "bias"):
            continue
        (dim,) = whole_dims(blocks.layout)
        assert blocks.shape[dim] == WIDTH, name
        assert all(tiles.is_unit for other, tiles in enumerate(blocks.layout.dims) if other != dim), name


SQUARE = {
    "layers.0.attention.wq.weight": 1,
    "layers.0.attention.wv.weight": 1,
    "layers.0.attention.wo.weight": 0,
    "model.layers.0.self_attn.k_proj.weight": 1,
    "model.layers.0.self_attn.o_proj.weight": 0,
    "encoder.layer.0.attention.self.query.weight": 1,
    "encoder.layer.0.attention.output.dense.weight": 0,
    "encoder.block.0.layer.0.SelfAttention.o.weight": 0,
    "layers.0.feed_forward.w1.weight": 1,
    "layers.0.feed_forward.w2.weight": 0,
    "layers.0.moe.router.gate.weight": 1,
    "layers.0.attention.wkv_a.weight": 1,
    "layers.0.attention.wkv_b.weight": 1,
    "layers.0.moe.shared_experts.w2.weight": 0,
    "layers.0.attention.wo.lora_B.default.weight": 1,
}
"""Name of a square matrix -> the dim along which its blocks lie."""


def test_square_matrices_go_by_their_names() -> None:
    got = Partition.transformer(second_moment="channels").assign(dict.fromkeys(SQUARE, (8, 8)))
    assert {name: whole_dims(blocks.layout) for name, blocks in got.items()} == {n: [dim] for n, dim in SQUARE.items()}


@pytest.mark.parametrize("transposed", [False, True])
def test_square_projections_of_gpt2_either_way_round(transposed: bool) -> None:
    fused = (8, 24) if transposed else (24, 8)
    shapes = {"h.0.attn.c_attn.weight": fused, "h.0.attn.c_proj.weight": (8, 8)}
    got = Partition.transformer(second_moment="channels").assign(shapes)
    assert [whole_dims(one.layout) for one in got.values()] == ([[0], [1]] if transposed else [[1], [0]])


EXPERTS = {
    "layers.0.moe.experts.w1": 2,
    "layers.0.moe.experts.w2": 1,
    "layers.0.moe.experts.w3": 2,
    "layers.0.moe.experts.mlp1_weight": 2,
    "layers.0.moe.experts.mlp2_weight": 1,
    "moe.routed_experts.inner_experts.w2_EDF": 1,
    "moe.routed_experts.inner_experts.w3_EFD": 2,
}


def test_experts() -> None:
    got = Partition.transformer(second_moment="channels").assign(dict.fromkeys(EXPERTS, (3, 8, 8)))
    assert {name: whole_dims(blocks.layout) for name, blocks in got.items()} == {n: [dim] for n, dim in EXPERTS.items()}


def test_llama_as_inspect_found_it() -> None:
    """The roles of docs/evidence, written out, are the same blocks."""
    roles = {"*.wq.weight": "neuron", "*.wk.weight": "neuron", "*.wo.weight": "neuron.T", "*.w2.weight": "neuron.T"}
    shapes = {
        "tok_embeddings.weight": (32, 8),
        "layers.0.attention.wq.weight": (8, 8),
        "layers.0.attention.wk.weight": (4, 8),
        "layers.0.attention.wv.weight": (4, 8),
        "layers.0.attention.wo.weight": (8, 8),
        "layers.0.feed_forward.w1.weight": (20, 8),
        "layers.0.feed_forward.w2.weight": (8, 20),
        "layers.0.feed_forward.w3.weight": (20, 8),
        "layers.0.attention_norm.weight": (8,),
        "output.weight": (32, 8),
    }

    def cut(partition: Partition) -> dict[str, tuple[str, BlockLayout]]:
        return {name: (one.role, one.layout) for name, one in partition.assign(shapes).items()}

    by_hand = Partition.transformer(n_heads=2, n_kv_heads=1, roles=roles)
    assert cut(Partition.transformer(second_moment="channels")) == cut(by_hand)
    assert cut(by_hand) != cut(Partition.transformer(n_heads=2, n_kv_heads=1))


@pytest.mark.parametrize("second_moment", ["channels", "factored"])
def test_the_users_roles_stay(second_moment: str) -> None:
    shapes = {f"layers.0.attention.{name}.weight": (8, 8) for name in ("wq", "wo", "wv")}
    roles = {"wq.weight": "query", "wo.weight": "neuron"}
    got = Partition.transformer(n_heads=2, roles=roles, second_moment=second_moment).assign(shapes)
    *given, other = ([layout.grid_shape for layout in one.layouts] for one in got.values())
    assert given == [[(2, 1)], [(8, 1)]]
    assert other == ([(8, 1)] if second_moment == "channels" else [(8, 1), (1, 8), (1, 1)])


def test_decay_goes_by_the_role_in_the_model() -> None:
    partition = Partition.transformer(second_moment="channels", undecayed=["query"])
    got = partition.assign({"attention.wq.weight": (8, 6), "attention.wk.weight": (8, 6)})
    assert [one.decay for one in got.values()] == [False, True]


def test_one_block_for_all_values_has_no_place_there() -> None:
    with pytest.raises(ValueError, match="cannot be combined with value_blocks='tensor'"):
        Partition.transformer(second_moment="channels", value_blocks="tensor")


def test_what_writes_is_among_the_rules() -> None:
    assert {rule.pattern for rule in TRANSFORMER if rule.writes} == WRITES


def test_it_is_printed() -> None:
    assert "outputs of attention and MLPs by columns" in str(Partition.transformer(second_moment="channels"))

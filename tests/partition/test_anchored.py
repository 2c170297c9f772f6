"""Names that a careless pattern would catch, layouts that look alike, and what a partition survives."""

import copy
import pickle
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_adam_mini.layout import Tiles
from titan_adam_mini.partition import Geometry, Partition, summarize

BERT = {
    "bert.embeddings.word_embeddings.weight": ((20, 8), "token"),
    "bert.embeddings.LayerNorm.weight": ((8,), "norm"),
    "bert.encoder.layer.0.attention.self.query.weight": ((8, 8), "query"),
    "bert.encoder.layer.0.attention.self.key.weight": ((8, 8), "key"),
    "bert.encoder.layer.0.attention.self.value.weight": ((8, 8), "value"),
    "bert.encoder.layer.0.attention.output.dense.weight": ((8, 8), "neuron"),
    "bert.encoder.layer.0.attention.output.LayerNorm.weight": ((8,), "norm"),
    "bert.encoder.layer.0.attention.output.LayerNorm.bias": ((8,), "bias"),
    "bert.encoder.layer.0.output.dense.weight": ((8, 16), "neuron"),
}
VIT = {
    "vit.embeddings.cls_token": ((1, 1, 8), "token"),
    "vit.embeddings.position_embeddings": ((1, 5, 8), "token"),
    "vit.embeddings.patch_embeddings.projection.weight": ((8, 3, 2, 2), "convolution"),
    "vit.encoder.layer.0.attention.attention.query.weight": ((8, 8), "query"),
    "vit.encoder.layer.0.layernorm_before.weight": ((8,), "norm"),
}
T5 = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": ((8, 8), "query"),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ((32, 2), "bias"),
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": ((8, 16), "neuron"),
    "shared.weight": ((20, 8), "token"),
}


@pytest.mark.parametrize("table", [BERT, VIT, T5], ids=["bert", "vit", "t5"])
def test_encoders_get_the_role_of_their_component_not_of_a_substring(table: dict) -> None:
    got = Partition.transformer(n_heads=2).assign({name: shape for name, (shape, _) in table.items()})
    assert {name: (blocks.shape, blocks.role) for name, blocks in got.items()} == table


def test_globs_too_start_at_a_component() -> None:
    partition = Partition.transformer(roles={"mix*.weight": "tensor"})
    got = partition.assign({"a.mix1.weight": (4, 4)})
    assert got["a.mix1.weight"].role == "tensor"
    with pytest.raises(ValueError, match=r"1 parameter.*\n  a.remix1.weight \(4, 4\)"):
        partition.assign({"a.mix1.weight": (4, 4), "a.remix1.weight": (4, 4)})


def test_positions_are_cut_by_row_and_patches_by_channel() -> None:
    got = Partition.transformer(n_heads=2).assign({name: shape for name, (shape, _) in VIT.items()})
    assert got["vit.embeddings.position_embeddings"].layout.grid_shape == (1, 5, 1)
    assert got["vit.embeddings.patch_embeddings.projection.weight"].layout.grid_shape == (8, 1, 1, 1)


def test_a_separate_query_beside_c_proj_says_that_weights_are_not_transposed() -> None:
    names = ("self_attn.q_proj", "mlp.c_fc", "mlp.c_proj")
    shapes = {f"model.layers.0.{name}.weight": (8, 4) for name in names}
    assert [b.role for b in Partition.transformer(n_heads=2).assign(shapes).values()] == ["query", "neuron", "neuron"]


def test_c_attn_that_disagree() -> None:
    shapes = {"h.0.attn.c_attn.weight": (4, 12), "h.1.attn.c_attn.weight": (12, 4)}
    with pytest.raises(ValueError, match=r"attn\.c_attn\.weight and the biases of this model contradict"):
        Partition.transformer(n_heads=2).assign(shapes)


@pytest.mark.parametrize("name", ["attn.qkv_proj", "crossattention.c_attn", "linear_attn.in_proj_qkvz"])
def test_layouts_that_are_not_known_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="1 parameter"):
        Partition.transformer(n_heads=2).assign({f"h.0.{name}.weight": (24, 8)})


@pytest.mark.parametrize("name", ["attention.query_key_value", "self_attention.query_key_value"])
def test_fused_per_head_with_as_many_keys_as_queries(name: str) -> None:
    # per head: its query, its key, its values
    layout = Partition.transformer(n_heads=2).assign({f"h.0.{name}.weight": (12, 4)})[f"h.0.{name}.weight"].layout
    assert layout.dims[0].lengths() == [2, 2, 1, 1, 2, 2, 1, 1]


def test_queries_of_latent_attention_do_not_take_a_configs_head_dim() -> None:
    config = {"num_attention_heads": 2, "head_dim": 2, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2}
    got = Partition.from_config(config).assign({"self_attn.q_proj.weight": (10, 4)})
    assert got["self_attn.q_proj.weight"].layout.dims[0] == Tiles(((2, 5),))


def test_a_config_of_layers_is_asked_for_its_first_attention() -> None:
    attention = SimpleNamespace(n_heads=4, n_kv_heads=2, head_dim=None)
    config = SimpleNamespace(dim=8, layers=[], first_attention=attention)
    assert Geometry.of(config) == Geometry(n_heads=4, n_kv_heads=2)


@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    size=st.integers(1, 5),
    inputs=st.integers(1, 3),
    given_=st.sampled_from(["kv", "head_dim", "both"]),
)
def test_fused_heads_by_any_of_their_numbers(groups: int, per_group: int, size: int, inputs: int, given_: str) -> None:
    geometry = Geometry(
        n_heads=groups * per_group,
        n_kv_heads=None if given_ == "head_dim" else groups,
        head_dim=None if given_ == "kv" else size,
    )
    shapes = {"attn.Wqkv.weight": ((per_group + 2) * groups * size, inputs)}
    shapes |= {"qkv_linear.wqkv.weight": shapes["attn.Wqkv.weight"]}
    after, within = (
        blocks.layout.dims[0].lengths() for blocks in Partition.transformer(geometry).assign(shapes).values()
    )
    assert after == [size] * (per_group + 1) * groups + [1] * groups * size
    assert within == ([size] * (per_group + 1) + [1] * size) * groups


def test_a_partition_is_a_value() -> None:
    one = Partition.transformer(n_heads=2, roles={"odd": "rows:2"}, undecayed=["norm"])
    shapes = {"odd": (4, 2), "layers.0.wq.weight": (4, 2), "norm.weight": (2,)}
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert other == one
        assert other.assign(shapes) == one.assign(shapes)
    assert Partition.transformer(n_heads=4) != one
    assert list(one.assign(shapes)) == list(shapes)
    assert [row.names for row in summarize(one.assign(shapes).values())] == [(name,) for name in shapes]


@pytest.mark.parametrize("role", ["query", "key", "query_key", "value", "qkv", "neuron", "experts", "token"])
def test_parameters_without_elements_have_no_blocks(role: str) -> None:
    shape = (0, 4, 2) if role == "experts" else (0, 4)
    partition = Partition.transformer(n_heads=2, n_kv_heads=2, roles={"empty": role})
    assert partition.assign({"empty": shape})["empty"].layout.num_blocks == 0

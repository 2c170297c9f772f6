"""The rules: who wins, what fused layouts cut, what is decayed, and the sentences of the errors."""

import re

import pytest
import torch

from titan_adam_mini.layout import BlockLayout
from titan_adam_mini.partition import ROLES, Geometry, Partition, clean_name, summarize

SIX_TWO = {"n_heads": 6, "n_kv_heads": 2}


def ids(layout: BlockLayout) -> torch.Tensor:
    """The block number of every element."""
    out = torch.zeros(layout.shape, dtype=torch.long)
    for dim, tiles in enumerate(layout.dims):
        along = torch.repeat_interleave(torch.arange(tiles.count), torch.tensor(tiles.lengths()))
        out = out * tiles.count + along.view([-1 if d == dim else 1 for d in range(len(layout.dims))])
    return out


def only(partition: Partition, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The block numbers of one parameter's first dim, the other dims checked to be whole."""
    blocks = ids(partition.assign({name: shape})[name].layout)
    assert torch.equal(blocks, blocks.flatten(1)[:, :1].view(-1, *[1] * (len(shape) - 1)).expand(shape))
    return blocks.flatten(1)[:, 0]


# Fused layouts, against maps written by hand: one number per row, blocks numbered from above


def test_queries_keys_and_values_one_after_the_other() -> None:
    # 3 query heads and 1 key head of 2 rows, then 2 value rows
    got = only(Partition.transformer(n_heads=3, n_kv_heads=1), "h.0.attn.Wqkv.weight", (10, 5))
    assert got.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]


def test_values_of_a_fused_projection_as_one_block() -> None:
    partition = Partition.transformer(n_heads=3, n_kv_heads=1, value_blocks="tensor")
    assert only(partition, "h.0.attn.Wqkv.weight", (10, 5)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_queries_keys_and_values_per_key_head() -> None:
    # twice: 2 query heads of 2 rows, the key head, its 2 value rows
    got = only(Partition.transformer(n_heads=4, n_kv_heads=2), "layers.0.attention.qkv_linear.wqkv.weight", (16, 3))
    assert got.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 9]


def test_queries_keys_values_and_mlp_in_one() -> None:
    got = only(Partition.transformer(n_heads=2, head_dim=2), "single_blocks.0.linear1.weight", (15, 4))
    assert got.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10]


LATENT = Geometry(n_heads=2, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=2, kv_lora_rank=4)


@pytest.mark.parametrize(
    ("name", "rows", "blocks"),
    [
        ("attention.wq.weight", 10, [0] * 5 + [1] * 5),
        ("attention.wq_b.weight", 10, [0] * 5 + [1] * 5),
        ("attention.wkv_a.weight", 6, [0, 1, 2, 3, 4, 4]),
        ("attention.wkv_b.weight", 10, [0, 0, 0, 1, 2, 3, 3, 3, 4, 5]),
    ],
)
def test_latent_attention(name: str, rows: int, blocks: list[int]) -> None:
    assert only(Partition.transformer(LATENT), name, (rows, 7)).tolist() == blocks


def test_a_transposed_fused_projection_is_cut_along_its_columns() -> None:
    shapes = {"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_proj.weight": (4, 4)}
    got = Partition.transformer(n_heads=2).assign(shapes)
    columns = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7])
    assert torch.equal(ids(got["h.0.attn.c_attn.weight"].layout), columns.expand(4, 12))
    assert torch.equal(ids(got["h.0.attn.c_proj.weight"].layout), torch.arange(4).expand(4, 4))
    assert got["h.0.attn.c_proj.weight"].role == "neuron.T"


def test_experts_either_way_round() -> None:
    straight = {"mlp.experts.gate_up_proj": (2, 6, 5), "mlp.experts.down_proj": (2, 5, 3)}
    turned = {name: (e, b, a) for name, (e, a, b) in straight.items()}
    for shapes in (straight, turned):
        for name, blocks in Partition.transformer().assign(shapes).items():
            experts, out, inner = straight[name]
            want = torch.arange(experts * out).view(experts, out, 1).expand(experts, out, inner)
            assert torch.equal(ids(blocks.layout), want if shapes is straight else want.transpose(1, 2))
    with pytest.raises(ValueError, match=r"mlp.experts.gate_up_proj .* give it the role 'experts' or 'experts.T'"):
        Partition.transformer().assign({"mlp.experts.gate_up_proj": (2, 6, 5)})


def test_roles_with_a_number_of_rows_and_convolutions() -> None:
    partition = Partition.transformer(roles={"odd.weight": "rows:3", "turned": "rows:2.T"})
    got = partition.assign({"odd.weight": (6, 2), "turned": (3, 4), "patch_embed.proj.weight": (3, 2, 4, 4)})
    assert ids(got["odd.weight"].layout)[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert ids(got["turned"].layout)[0].tolist() == [0, 0, 1, 1]
    assert got["patch_embed.proj.weight"].layout.grid_shape == (3, 1, 1, 1)


@pytest.mark.parametrize(("value_blocks", "grid"), [("neuron", (8, 1)), ("tensor", (1, 1))])
def test_value_blocks(value_blocks: str, grid: tuple[int, int]) -> None:
    shapes = {"attention.wv.weight": (8, 4), "attention.wo.weight": (4, 8)}
    got = Partition.transformer(value_blocks=value_blocks).assign(shapes)
    assert got["attention.wv.weight"].layout.grid_shape == grid
    assert got["attention.wo.weight"].layout.grid_shape == (4, 1)


LORA = {
    "base_model.model.layers.0.self_attn.q_proj.base_layer.weight": ((48, 48), "query", (6, 1)),
    "base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight": ((3, 48), "neuron", (3, 1)),
    "base_model.model.layers.0.self_attn.q_proj.lora_B.default.weight": ((48, 3), "query", (6, 1)),
    "base_model.model.layers.0.self_attn.k_proj.lora_B.default.weight": ((16, 3), "key", (2, 1)),
    "base_model.model.layers.0.self_attn.v_proj.lora_B.default.weight": ((16, 3), "value", (16, 1)),
    "base_model.model.layers.0.self_attn.o_proj.lora_B.default.weight": ((48, 3), "neuron", (48, 1)),
    "layers.0.attention.wq.lora_b.weight": ((48, 3), "query", (6, 1)),
    "layers.0.attention.wq.lora_a.weight": ((3, 48), "neuron", (3, 1)),
}


def test_adapters_come_before_what_they_adapt() -> None:
    got = Partition.transformer(**SIX_TWO).assign({name: shape for name, (shape, _, _) in LORA.items()})
    assert {n: (b.shape, b.role, b.layout.grid_shape) for n, b in got.items()} == LORA


# Which rule


def test_the_first_match_wins_and_the_users_come_first() -> None:
    partition = Partition.transformer(
        roles={"layers.0.*.wq.weight": "tensor", "wq.weight": "rows:2", "layers.1.*.wq.weight": "neuron"}
    )
    got = partition.assign({f"layers.{i}.attention.wq.weight": (8, 4) for i in range(2)})
    assert [blocks.role for blocks in got.values()] == ["tensor", "rows:2"]
    assert [blocks.pattern for blocks in got.values()] == ["layers.0.*.wq.weight", "wq.weight"]


@pytest.mark.parametrize("pattern", ["q.weight", "q.weigh[t]"])
def test_a_pattern_starts_at_a_component_and_covers_the_rest(pattern: str) -> None:
    partition = Partition.transformer(roles={pattern: "tensor"})
    for unknown in ("layers.0.xq.weight", "a.q.weight_g"):
        with pytest.raises(
            ValueError, match=re.escape(f"no rule matches 1 parameter, and there is no default role:\n  {unknown} ")
        ):
            partition.assign({unknown: (4, 4), "a.q.weight": (4, 4)})


def test_a_built_in_rule_has_to_fit_the_dims() -> None:
    with pytest.raises(ValueError, match=r"head_norm.weight \(4, 4\)"):
        Partition.transformer().assign({"head_norm.weight": (4, 4)})


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.layers.0.attention.wq.weight",
        "module._orig_mod.layers.0._checkpoint_wrapped_module.attention.wq.weight",
        "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.attention._orig_mod.wq.weight",
    ],
)
def test_wrappers_are_looked_through(wrapped: str) -> None:
    assert clean_name(wrapped) == "layers.0.attention.wq.weight"
    blocks = Partition.transformer(n_heads=2).assign({wrapped: (8, 4)})[wrapped]
    assert (blocks.name, blocks.role) == ("layers.0.attention.wq.weight", "query")


def test_names_that_are_alike_without_wrappers_keep_their_own_shapes() -> None:
    got = Partition.transformer(n_heads=2).assign({"wq.weight": (8, 4), "module.wq.weight": (8, 6)})
    assert [blocks.shape for blocks in got.values()] == [(8, 4), (8, 6)]
    assert [blocks.layout.shape for blocks in got.values()] == [(8, 4), (8, 6)]


# Decay


def test_everything_is_decayed_unless_said() -> None:
    shapes = {"norm.weight": (4,), "wo.weight": (4, 4), "wo.bias": (4,), "layers.3.w1.weight": (4, 4)}
    assert all(blocks.decay for blocks in Partition.transformer().assign(shapes).values())
    got = Partition.transformer(undecayed=["norm", "bias", "layers.3.*"]).assign(shapes)
    assert [blocks.decay for blocks in got.values()] == [False, True, False, False]


def test_roles_without_decay_are_no_patterns() -> None:
    partition = Partition.transformer(roles={"a": "rows:2", "b": "rows:2.T"}, undecayed=["rows:2"])
    got = partition.assign({"a": (4, 4), "b": (4, 4), "wo.weight": (4, 4)})
    assert [blocks.decay for blocks in got.values()] == [False, False, True]
    with pytest.raises(ValueError, match=re.escape("write ['norm']")):
        Partition.transformer(undecayed="norm")


def test_a_role_of_yours_does_not_switch_decay_on() -> None:
    shapes = {"norm.weight": (4,), "wo.weight": (4, 4), "w1.weight": (4, 4)}
    roles = {"norm.weight": "bias", "wo.weight": "tensor", "w1.weight": "factored"}
    for undecayed, want in (
        (["norm"], [False, True, True]),
        (["neuron"], [True, False, False]),
        (["tensor"], [True, False, True]),
        (["token"], [True, True, True]),
    ):
        got = Partition.transformer(roles=roles, undecayed=undecayed).assign(shapes)
        assert [blocks.decay for blocks in got.values()] == want


def test_other_roles_in_place_of_the_users() -> None:
    partition = Partition.transformer(n_heads=2, roles={"wq.weight": "tensor"}, undecayed=["norm"])
    other = partition.with_roles({"wk.weight": "neuron"})
    assert other == Partition.transformer(n_heads=2, roles={"wk.weight": "neuron"}, undecayed=["norm"])


# Algorithm 2, the summary


def test_one_block_per_tensor_is_asked_for_by_name() -> None:
    got = Partition.per_tensor(undecayed=["*.b"]).assign({"any.w": (3, 4, 5), "any.b": (3,), "s": ()})
    assert [blocks.layout.num_blocks for blocks in got.values()] == [1, 1, 1]
    assert [blocks.decay for blocks in got.values()] == [True, False, True]


def test_the_summary_collapses_numbers_only_where_all_else_is_alike() -> None:
    shapes = {f"layers.{i}.wo.weight": (4, 4) for i in range(3)} | {"layers.3.wo.weight": (6, 4)}
    rows = summarize(Partition.transformer().assign(shapes).values())
    assert [(row.pattern, row.shape, len(row.names)) for row in rows] == [
        ("layers.*.wo.weight", (4, 4), 3),
        ("layers.*.wo.weight", (6, 4), 1),
    ]


def test_a_partition_prints_its_rules_the_users_first() -> None:
    text = str(Partition.transformer(n_heads=2, roles={"mine": "tensor"}, undecayed=["norm"]))
    assert text.startswith("Partition: n_heads=2; values by neuron")
    assert text.index("tensor (custom)") < text.index("lora_[Aa]")
    assert text.endswith("without decay: norm")


# Errors, in words


def test_an_unknown_parameter_shows_the_line_that_gives_it_a_role() -> None:
    shapes = {f"layers.{i}.mixer.weight": (4, 4) for i in range(7)} | {"gain": (4,), "wo.weight": (4, 4)}
    with pytest.raises(ValueError) as caught:
        Partition.transformer().assign(shapes)
    text = str(caught.value)
    assert text.startswith("no rule matches 8 parameters")
    assert "layers.0.mixer.weight (4, 4)" in text
    assert "and 3 more" in text
    assert 'Partition.transformer(..., roles={"layers.*.mixer.weight": "neuron", "gain": "bias"})' in text
    assert '[optimizer.adam_mini]\n  roles = {"layers.*.mixer.weight" = "neuron", "gain" = "bias"}' in text
    assert all(f"\n  {role}: " in text for role in ROLES)
    taken = Partition.transformer(roles={"layers.*.mixer.weight": "neuron", "gain": "bias"}).assign(shapes)
    assert taken["gain"].layout.num_blocks == 4


def test_a_pattern_that_matches_nothing() -> None:
    shapes = {"layers.0.attention.wq.weight": (4, 4)}
    for wrong in ({"roles": {"attention.wqq.weight": "query"}}, {"undecayed": ["attention.wqq.weight"]}):
        partition = Partition.transformer(n_heads=2, **wrong)
        with pytest.raises(ValueError, match=r"'attention.wqq.weight' matches no .* layers.\*.attention.wq.weight"):
            partition.assign(shapes)
        assert partition.assign(shapes, partial=True)
        assert partition.unused(shapes) == ["attention.wqq.weight"]


@pytest.mark.parametrize(
    ("heads", "name", "shape", "sentence"),
    [
        ({}, "wq.weight", (8, 4), "the number of heads is needed: pass n_heads"),
        ({"n_heads": 3}, "wq.weight", (8, 4), "8 rows are not divisible by n_heads = 3"),
        ({"head_dim": 3}, "wk.weight", (8, 4), "8 rows are not divisible by head_dim = 3"),
        ({"n_heads": 2, "head_dim": 3}, "wq.weight", (8, 4), "8 rows are not n_heads = 2 heads of 3 rows each"),
        ({"n_heads": 2, "n_kv_heads": 3}, "wk.weight", (8, 4), "8 rows are not divisible by n_kv_heads = 3"),
        ({"n_heads": 3}, "wk.weight", (8, 4), "n_kv_heads (by default n_heads) = 3"),
        ({}, "attn.Wqkv.weight", (12, 4), "a fused projection needs n_heads"),
        ({"n_heads": 2}, "attn.Wqkv.weight", (8, 4), "without n_kv_heads its 8 rows should be 3 x 4"),
        ({"n_heads": 3, "n_kv_heads": 2}, "qkv_linear.wqkv.weight", (14, 4), "3 query heads are not divisible"),
        ({"n_heads": 2}, "wkv_b.weight", (8, 4), "qk_nope_head_dim, v_head_dim must be known"),
    ],
)
def test_heads_that_do_not_fit(heads: dict[str, int], name: str, shape: tuple[int, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"parameter {name} of shape {shape}")) as caught:
        Partition.transformer(**heads).assign({name: shape})
    assert sentence in str(caught.value)


def test_key_heads_forgotten() -> None:
    shapes = {"layers.0.attention.wq.weight": (16, 4), "layers.0.attention.wk.weight": (8, 4)}
    with pytest.raises(ValueError, match=r"heads of different sizes: 4 rows in .*wq.* 2 rows in .*wk.*Pass n_kv_heads"):
        Partition.transformer(n_heads=4).assign(shapes)
    assert Partition.transformer(n_heads=4, n_kv_heads=2).assign(shapes)


def test_wrong_words_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown role 'neurons'; valid roles are token, query"):
        Partition.transformer(roles={"x": "neurons"})
    for role in ("rows:0", "rows:", "rows:-3", "norm.T", ""):
        with pytest.raises(ValueError, match="unknown role"):
            Partition.transformer(roles={"x": role})
    with pytest.raises(ValueError, match="value_blocks must be one of neuron, tensor, not 'head'"):
        Partition.transformer(value_blocks="head")
    with pytest.raises(ValueError, match="n_heads must be a positive integer or None, not 0"):
        Partition.transformer(n_heads=0)
    with pytest.raises(ValueError, match="role norm: this role is for tensors of at most 1 dims, but this one has 2"):
        Partition.transformer(roles={"x": "norm"}).assign({"x": (2, 2)})


def test_heads_of_configs() -> None:
    assert Geometry.of({"num_attention_heads": 6, "num_key_value_heads": 2}) == Geometry(6, 2)
    assert Geometry.of({"text_config": {"n_head": 6, "head_dim": 0}}) == Geometry(6)
    assert Geometry.of({"num_heads": 6, "axes_dim": (16, 56, 56)}).head_dim == 128
    assert Geometry.of({"n_head": 6, "multi_query": True}).n_kv_heads == 1

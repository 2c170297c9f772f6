"""Models inside a model, each with heads of its own, and torch's own transformer layers."""

from __future__ import annotations

import pytest
import torch

from titan_adam_mini.partition import Geometry, Partition, collapse

TWO = {"text_config": {"n_head": 6, "n_kv_head": 2}, "vision_config": {"n_head": 4}}


def test_parts_of_configs() -> None:
    text, vision = Geometry(6, 2), Geometry(4)
    assert Geometry.of(TWO) == Geometry(parts={"text": text, "vision": vision})
    assert Geometry.of({"n_head": 6, "vision_config": {"n_head": 4}}) == Geometry(6, parts={"vision": vision})
    # the encoder of WhisperForConditionalGeneration also goes by num_attention_heads
    sides = {"num_attention_heads": 6, "encoder_attention_heads": 6, "decoder_attention_heads": 4}
    assert Geometry.of(sides) == Geometry(parts={"encoder": Geometry(6), "decoder": vision})
    same = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    assert Geometry.of(same) == Geometry(4, parts={"encoder": vision, "decoder": vision})
    # a part whose heads cannot be read is a part, and no model is what only configures one
    assert list(Geometry.of({**TWO, "audio_config": {"model_type": "mobilenet"}}).parts) == ["text", "vision", "audio"]
    assert Geometry.of({"n_head": 6, "quantization_config": {"bits": 4}, "is_decoder": True}) == Geometry(6)
    nested = {"thinker_config": TWO, "talker_config": {"n_head": 3}}
    assert Geometry.of(nested) == Geometry(parts={"thinker": Geometry.of(TWO), "talker": Geometry(3)})


@pytest.mark.parametrize(
    ("name", "part", "heads"),
    [
        ("model.language_model.layers.0.self_attn.q_proj.weight", "text", 6),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", "text", 6),
        ("visual.blocks.0.attn.qkv.weight", "vision", 4),
        ("vision_tower.text_model.q_proj.weight", "vision", 4),
        ("thinker.visual.blocks.0.attn.qkv.weight", "thinker.vision", 2),
        ("thinker.model.layers.0.q_proj.weight", "thinker", 8),
        ("vision_language_encoder.layers.0.q_proj.weight", "vision_language", 12),
        ("revision.layers.0.q_proj.weight", "", None),
        ("model.layers.0.self_attn.q_proj.weight", "", None),
    ],
)
def test_the_first_component_that_names_a_part_decides(name: str, part: str, heads: int | None) -> None:
    thinker = Geometry(8, parts={"vision": Geometry(2)})
    parts = {**Geometry.of(TWO).parts, "thinker": thinker, "vision_language": Geometry(12)}
    found, geometry = Geometry(parts=parts).part_of(name)
    assert (found, geometry.n_heads) == (part, heads)


def test_heads_are_checked_within_a_part() -> None:
    shapes = {
        "language_model.layers.0.self_attn.q_proj.weight": (48, 8),
        "language_model.layers.0.self_attn.k_proj.weight": (16, 8),
        "vision_tower.layers.0.self_attn.q_proj.weight": (48, 8),
        "vision_tower.layers.0.self_attn.k_proj.weight": (48, 8),
    }
    got = Partition.from_config(TWO).assign(shapes)
    assert [one.layout.dims[0].lengths()[0] for one in got.values()] == [8, 8, 12, 12]
    shapes["vision_tower.layers.0.self_attn.k_proj.weight"] = (24, 8)
    with pytest.raises(ValueError, match=r"different sizes: 12 rows in vision_tower.* 6 rows in vision_tower"):
        Partition.from_config(TWO).assign(shapes)


def test_projections_outside_every_part_ask_for_their_heads() -> None:
    shapes = {"projector.cross_attn.q_proj.weight": (24, 8)}
    with pytest.raises(ValueError, match=r"query in none of the model's parts \(text, vision; see Geometry.parts\)"):
        Partition.from_config(TWO).assign(shapes)
    parts = {**Geometry.of(TWO).parts, "projector": Geometry(3)}
    got = Partition.transformer(Geometry(parts=parts)).assign(shapes)
    assert got["projector.cross_attn.q_proj.weight"].layout.dims[0].lengths() == [8, 8, 8]
    assert "text (n_heads=6, n_kv_heads=2), vision (n_heads=4)" in str(Partition.from_config(TWO))
    assert hash(Geometry.of(TWO)) == hash(Geometry.of(TWO))


# torch.nn's own transformer


def test_torchs_own_layers_need_only_the_number_of_heads() -> None:
    with torch.device("meta"):
        model = torch.nn.Transformer(8, 2, 1, 1, dim_feedforward=12, batch_first=True)
        other = torch.nn.MultiheadAttention(8, 2, kdim=6, vdim=5, add_bias_kv=True)
    shapes = {name: tuple(param.shape) for name, param in [*model.named_parameters(), *other.named_parameters()]}
    got = Partition.transformer(n_heads=2).assign(shapes)
    for name, blocks in got.items():
        if name.endswith("in_proj_weight"):
            assert blocks.layout.dims[0].lengths() == [4] * 4 + [1] * 8, "2 queries, 2 keys, 8 values"
        elif blocks.role == "neuron":
            assert blocks.layout.grid_shape == (blocks.shape[0], 1)
    roles = {collapse(name).rpartition("layers.*.")[2]: blocks.role for name, blocks in got.items()}
    assert {name: role for name, role in roles.items() if not name.endswith((".bias", "norm.weight"))} == {
        "self_attn.in_proj_weight": "qkv",
        "self_attn.in_proj_bias": "bias",
        "self_attn.out_proj.weight": "neuron",
        "multihead_attn.in_proj_weight": "qkv",
        "multihead_attn.in_proj_bias": "bias",
        "multihead_attn.out_proj.weight": "neuron",
        "linear1.weight": "neuron",
        "linear2.weight": "neuron",
        **{f"norm{number}.weight": "norm" for number in (1, 2, 3)},
        "q_proj_weight": "query",
        "k_proj_weight": "key",
        "v_proj_weight": "value",
        "in_proj_bias": "bias",
        "bias_k": "bias",
        "bias_v": "bias",
        "out_proj.weight": "neuron",
    }

"""Models of several parts, as transformers 5.24 names and shapes their parameters: roles and blocks, by hand.

The text has 6 heads and 2 key heads, the picture 4, so that no number serves for both; 48 and 32 rows divide by all.
"""

from __future__ import annotations

from typing import Any

from families import CONFIG, HEADS, Row, llama

PICTURE_HEADS, PICTURE = 4, 32
VISION = {
    "hidden_size": PICTURE,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": PICTURE_HEADS,
    "image_size": 28,
    "patch_size": 14,
}
Rows = dict[str, Row]


def linear(name: str, out: int, inputs: int, role: str = "neuron", blocks: int = 0, bias: bool = True) -> Rows:
    """A weight with one block per row or `blocks` of them, and its elementwise bias."""
    rows: Rows = {f"{name}.weight": ((out, inputs), role, (blocks or out, 1))}
    return rows | ({f"{name}.bias": ((out,), "bias", (out,))} if bias else {})


def norm(name: str, size: int, bias: bool = True) -> Rows:
    rows: Rows = {f"{name}.weight": ((size,), "norm", (1,))}
    return rows | ({f"{name}.bias": ((size,), "bias", (size,))} if bias else {})


def attention(name: str, width: int, heads: int, bias: str = "qkvo") -> Rows:
    return (
        linear(f"{name}.q_proj", width, width, "query", heads, "q" in bias)
        | linear(f"{name}.k_proj", width, width, "key", heads, "k" in bias)
        | linear(f"{name}.v_proj", width, width, "value", bias="v" in bias)
        | linear(f"{name}.out_proj", width, width, bias="o" in bias)
    )


def mlp(name: str, width: int, hidden: int) -> Rows:
    return linear(f"{name}fc1", hidden, width) | linear(f"{name}fc2", width, hidden)


def layers(name: str, width: int, heads: int, hidden: int) -> Rows:
    """The layers of CLIP and SigLIP."""
    one = f"{name}.encoder.layers.*"
    norms = norm(f"{one}.layer_norm1", width) | norm(f"{one}.layer_norm2", width)
    return attention(f"{one}.self_attn", width, heads) | mlp(f"{one}.mlp.", width, hidden) | norms


def clip_vision(name: str) -> Rows:
    """One class token and four patches."""
    return {
        f"{name}.embeddings.class_embedding": ((PICTURE,), "norm", (1,)),
        f"{name}.embeddings.patch_embedding.weight": ((PICTURE, 3, 14, 14), "convolution", (PICTURE, 1, 1, 1)),
        f"{name}.embeddings.position_embedding.weight": ((5, PICTURE), "token", (5, 1)),
        **norm(f"{name}.pre_layrnorm", PICTURE),
        **layers(name, PICTURE, PICTURE_HEADS, 24),
        **norm(f"{name}.post_layernorm", PICTURE),
    }


def siglip_vision(name: str) -> Rows:
    """Four patches; Idefics3 leaves the head out."""
    return {
        f"{name}.embeddings.patch_embedding.weight": ((PICTURE, 3, 14, 14), "convolution", (PICTURE, 1, 1, 1)),
        f"{name}.embeddings.patch_embedding.bias": ((PICTURE,), "bias", (PICTURE,)),
        f"{name}.embeddings.position_embedding.weight": ((4, PICTURE), "token", (4, 1)),
        **layers(name, PICTURE, PICTURE_HEADS, 24),
        **norm(f"{name}.post_layernorm", PICTURE),
    }


def siglip_head(name: str) -> Rows:
    """torch.nn.MultiheadAttention with a learned query: 4 query and 4 key heads, then 32 values."""
    return {
        f"{name}.probe": ((1, 1, PICTURE), "token", (1, 1, 1)),
        f"{name}.attention.in_proj_weight": ((96, PICTURE), "qkv", (2 * PICTURE_HEADS + PICTURE, 1)),
        f"{name}.attention.in_proj_bias": ((96,), "bias", (96,)),
        **linear(f"{name}.attention.out_proj", PICTURE, PICTURE),
        **norm(f"{name}.layernorm", PICTURE),
        **mlp(f"{name}.mlp.", PICTURE, 24),
    }


def language(name: str, head: bool = True) -> Rows:
    rows = {known.replace("model.", f"{name}."): row for known, row in llama().items()}
    return {known: row for known, row in rows.items() if head or known != "lm_head.weight"}


def _gemma3() -> Rows:
    layer = "model.language_model.layers.*"
    extra = norm(f"{layer}.self_attn.q_norm", 8, False) | norm(f"{layer}.self_attn.k_norm", 8, False)
    for place in ("pre", "post"):
        extra |= norm(f"{layer}.{place}_feedforward_layernorm", 48, False)
    return {
        **siglip_vision("model.vision_tower"),
        **siglip_head("model.vision_tower.head"),
        "model.multi_modal_projector.mm_input_projection_weight": ((PICTURE, 48), "neuron.T", (1, 48)),
        **norm("model.multi_modal_projector.mm_soft_emb_norm", PICTURE, False),
        **language("model.language_model", head=False),
        **extra,
    }


def _qwen() -> Rows:
    block, merger = "model.visual.blocks.*", "model.visual.merger"
    biases = {
        f"model.language_model.layers.*.self_attn.{one}_proj.bias": ((size,), "bias", (size,))
        for one, size in (("q", 48), ("k", 16), ("v", 16))
    }
    return {
        "model.visual.patch_embed.proj.weight": ((PICTURE, 3, 2, 14, 14), "convolution", (PICTURE, 1, 1, 1, 1)),
        **norm(f"{block}.norm1", PICTURE, False),
        **norm(f"{block}.norm2", PICTURE, False),
        **linear(f"{block}.attn.qkv", 96, PICTURE, "qkv", 2 * PICTURE_HEADS + PICTURE),
        **linear(f"{block}.attn.proj", PICTURE, PICTURE),
        **linear(f"{block}.mlp.gate_proj", 24, PICTURE),
        **linear(f"{block}.mlp.up_proj", 24, PICTURE),
        **linear(f"{block}.mlp.down_proj", PICTURE, 24),
        **norm(f"{merger}.ln_q", PICTURE, False),
        **linear(f"{merger}.mlp.0", 128, 128),
        **linear(f"{merger}.mlp.2", 48, 128),
        **language("model.language_model"),
        **biases,
    }


def _clip() -> Rows:
    return {
        "logit_scale": ((), "bias", ()),
        "text_model.embeddings.token_embedding.weight": ((32, 48), "token", (32, 1)),
        "text_model.embeddings.position_embedding.weight": ((77, 48), "token", (77, 1)),
        **layers("text_model", 48, HEADS, 40),
        **norm("text_model.final_layer_norm", 48),
        **clip_vision("vision_model"),
        **linear("visual_projection", 16, PICTURE, bias=False),
        **linear("text_projection", 16, 48, bias=False),
    }


def _whisper() -> Rows:
    rows: Rows = {
        "model.encoder.conv1.weight": ((48, 8, 3), "convolution", (48, 1, 1)),
        "model.encoder.conv1.bias": ((48,), "bias", (48,)),
        "model.encoder.conv2.weight": ((48, 48, 3), "convolution", (48, 1, 1)),
        "model.encoder.conv2.bias": ((48,), "bias", (48,)),
        "model.encoder.embed_positions.weight": ((1500, 48), "token", (1500, 1)),
        "model.decoder.embed_tokens.weight": ((32, 48), "token", (32, 1)),
        "model.decoder.embed_positions.weight": ((448, 48), "token", (448, 1)),
    }
    for side, heads, kinds in (
        ("encoder", HEADS, ("self_attn",)),
        ("decoder", PICTURE_HEADS, ("self_attn", "encoder_attn")),
    ):
        layer = f"model.{side}.layers.*"
        for kind in kinds:
            rows |= attention(f"{layer}.{kind}", 48, heads, "qvo") | norm(f"{layer}.{kind}_layer_norm", 48)
        rows |= mlp(f"{layer}.", 48, 40) | norm(f"{layer}.final_layer_norm", 48) | norm(f"model.{side}.layer_norm", 48)
    return rows


def _t5() -> Rows:
    rows: Rows = {"shared.weight": ((32, 48), "token", (32, 1))}
    for side, kinds in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        block = f"{side}.block.*.layer"
        for place, kind in enumerate(kinds):
            name = f"{block}.{place}.{kind}"
            rows |= linear(f"{name}.q", 48, 48, "query", HEADS, False) | linear(
                f"{name}.k", 48, 48, "key", HEADS, False
            )
            rows |= linear(f"{name}.v", 48, 48, "value", bias=False) | linear(f"{name}.o", 48, 48, bias=False)
            rows |= norm(f"{block}.{place}.layer_norm", 48, False)
        rows[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = ((32, 6), "bias", (32, 6))
        dense = f"{block}.{len(kinds)}.DenseReluDense"
        rows |= linear(f"{dense}.wi", 40, 48, bias=False) | linear(f"{dense}.wo", 48, 40, bias=False)
        rows |= norm(f"{block}.{len(kinds)}.layer_norm", 48, False) | norm(f"{side}.final_layer_norm", 48, False)
    return rows


_ROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}

MULTI_PART: dict[str, tuple[str, dict[str, Any], Rows]] = {
    "Gemma3ForConditionalGeneration": (
        "gemma3",
        {"text_config": CONFIG | {"head_dim": 8}, "vision_config": VISION, "mm_tokens_per_image": 4},
        _gemma3(),
    ),
    "LlavaForConditionalGeneration": (
        "llava",
        {
            "text_config": CONFIG | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
        },
        {
            **clip_vision("model.vision_tower"),
            **linear("model.multi_modal_projector.linear_1", 48, PICTURE),
            **linear("model.multi_modal_projector.linear_2", 48, 48),
            **language("model.language_model"),
        },
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        {
            "text_config": CONFIG | _ROPE,
            "vision_config": {
                "depth": 2,
                "hidden_size": PICTURE,
                "num_heads": PICTURE_HEADS,
                "out_hidden_size": 48,
                "intermediate_size": 24,
            },
        },
        _qwen(),
    ),
    "CLIPModel": (
        "clip",
        {
            "text_config": {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"},
            "vision_config": VISION,
            "projection_dim": 16,
        },
        _clip(),
    ),
    "Idefics3ForConditionalGeneration": (
        "idefics3",
        {"text_config": CONFIG | {"model_type": "llama"}, "vision_config": VISION},
        {
            **siglip_vision("model.vision_model"),
            **linear("model.connector.modality_projection.proj", 48, 4 * PICTURE, bias=False),
            **language("model.text_model"),
        },
    ),
    "WhisperForConditionalGeneration": (
        "whisper",
        {
            "vocab_size": 32,
            "d_model": 48,
            "num_mel_bins": 8,
            "pad_token_id": 1,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": PICTURE_HEADS,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
        },
        _whisper(),
    ),
    "T5ForConditionalGeneration": (
        "t5",
        {"vocab_size": 32, "d_model": 48, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": HEADS},
        _t5(),
    ),
}
"""transformers' class -> (its model type, config, name -> (shape, role, shape of the block grid))."""

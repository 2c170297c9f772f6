"""What every parameter of the known model families is: role and blocks, written out by hand, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Runs = tuple[tuple[int, int], ...]
Shape = tuple[int, ...]
Want = tuple[str, Callable[[Shape, Any], tuple[Runs, ...]]]


def _whole(size: int) -> Runs:
    return ((1, size),)


def rows(shape: Shape, args: Any) -> tuple[Runs, ...]:
    """One block per index of the first dim."""
    return (((shape[0], 1),), *map(_whole, shape[1:]))


def whole(shape: Shape, args: Any) -> tuple[Runs, ...]:
    return tuple(map(_whole, shape))


def each(shape: Shape, args: Any) -> tuple[Runs, ...]:
    """Elementwise."""
    return tuple(((size, 1),) for size in shape)


def expert_rows(shape: Shape, args: Any) -> tuple[Runs, ...]:
    return ((shape[0], 1),), ((shape[1], 1),), _whole(shape[2])


def queries(shape: Shape, args: Any) -> tuple[Runs, ...]:
    size = getattr(args, "head_dim", None) or args.dim // args.n_heads
    assert args.n_heads * size == shape[0]
    return ((args.n_heads, size),), _whole(shape[1])


def keys(shape: Shape, args: Any) -> tuple[Runs, ...]:
    heads = args.n_kv_heads or args.n_heads
    size = getattr(args, "head_dim", None) or args.dim // args.n_heads
    assert heads * size == shape[0]
    return ((heads, size),), _whole(shape[1])


def latent_queries(shape: Shape, args: Any) -> tuple[Runs, ...]:
    return ((args.n_heads, args.qk_nope_head_dim + args.qk_rope_head_dim),), _whole(shape[1])


def latent_down(shape: Shape, args: Any) -> tuple[Runs, ...]:
    return ((args.kv_lora_rank, 1), (1, args.qk_rope_head_dim)), _whole(shape[1])


def latent_up(shape: Shape, args: Any) -> tuple[Runs, ...]:
    return ((1, args.qk_nope_head_dim), (args.v_head_dim, 1)) * args.n_heads, _whole(shape[1])


def flux_qkv(shape: Shape, args: Any) -> tuple[Runs, ...]:
    size = args.hidden_size // args.num_heads
    return ((2 * args.num_heads, size), (args.hidden_size, 1)), _whole(shape[1])


def flux_qkv_mlp(shape: Shape, args: Any) -> tuple[Runs, ...]:
    size = args.hidden_size // args.num_heads
    mlp = int(args.mlp_ratio * args.hidden_size)
    return ((2 * args.num_heads, size), (args.hidden_size + mlp, 1)), _whole(shape[1])


_DENSE: dict[str, Want] = {f"layers.*.feed_forward.w{i}.weight": ("neuron", rows) for i in (1, 2, 3)}
_ENDS: dict[str, Want] = {
    "tok_embeddings.weight": ("token", rows),
    "layers.*.attention_norm.weight": ("norm", whole),
    "layers.*.ffn_norm.weight": ("norm", whole),
    "norm.weight": ("norm", whole),
    "output.weight": ("token", rows),
}
_ATTENTION: dict[str, Want] = {
    "layers.*.attention.wq.weight": ("query", queries),
    "layers.*.attention.wk.weight": ("key", keys),
    "layers.*.attention.wv.weight": ("value", rows),
    "layers.*.attention.wo.weight": ("neuron", rows),
}
_MOE: dict[str, Want] = {
    **{f"layers.*.moe.experts.w{i}": ("experts", expert_rows) for i in (1, 2, 3)},
    "layers.*.moe.router.gate.weight": ("neuron", rows),
}
_SHARED: dict[str, Want] = {f"layers.*.moe.shared_experts.w{i}.weight": ("neuron", rows) for i in (1, 2, 3)}
_FLUX_MATRICES = """
    img_in txt_in time_in.in_layer time_in.out_layer vector_in.in_layer vector_in.out_layer final_layer.linear
    final_layer.adaLN_modulation.* single_blocks.*.linear2 single_blocks.*.modulation.lin
    double_blocks.*.img_mod.lin double_blocks.*.img_attn.proj double_blocks.*.img_mlp.*
    double_blocks.*.txt_mod.lin double_blocks.*.txt_attn.proj double_blocks.*.txt_mlp.*
""".split()  # noqa: SIM905
_FLUX_FUSED = {
    "double_blocks.*.img_attn.qkv": ("qkv", flux_qkv),
    "double_blocks.*.txt_attn.qkv": ("qkv", flux_qkv),
    "single_blocks.*.linear1": ("qkv_mlp", flux_qkv_mlp),
}

TITAN: dict[str, dict[str, Want]] = {
    "llama3": _ENDS | _ATTENTION | _DENSE,
    "llama4": _ENDS | _ATTENTION | _DENSE | _MOE | _SHARED,
    "qwen3": _ENDS
    | _ATTENTION
    | _DENSE
    | _MOE
    | {f"layers.*.attention.{one}_norm.weight": ("norm", whole) for one in "qk"},
    "deepseek_v3": _ENDS
    | _DENSE
    | _MOE
    | _SHARED
    | {
        "layers.*.attention.wq.weight": ("query", latent_queries),
        "layers.*.attention.wq_a.weight": ("neuron", rows),
        "layers.*.attention.wq_b.weight": ("query", latent_queries),
        "layers.*.attention.wkv_a.weight": ("latent_kv_in", latent_down),
        "layers.*.attention.wkv_b.weight": ("latent_kv_out", latent_up),
        "layers.*.attention.q_norm.weight": ("norm", whole),
        "layers.*.attention.kv_norm.weight": ("norm", whole),
        "layers.*.attention.wo.weight": ("neuron", rows),
    },
    "gpt_oss": _ENDS
    | _ATTENTION
    | {f"layers.*.attention.w{one}.bias": ("bias", each) for one in "qkvo"}
    | {f"layers.*.moe.experts.mlp{i}_weight": ("experts", expert_rows) for i in (1, 2)}
    | {f"layers.*.moe.experts.mlp{i}_bias": ("bias", each) for i in (1, 2)}
    | {
        "layers.*.attention.sinks": ("bias", each),
        "layers.*.moe.router.gate.weight": ("neuron", rows),
        "layers.*.moe.router.gate.bias": ("bias", each),
    },
    "flux": {f"{name}.weight": ("neuron", rows) for name in _FLUX_MATRICES}
    | {f"{name}.weight": want for name, want in _FLUX_FUSED.items()}
    | {f"{name}.bias": ("bias", each) for name in [*_FLUX_MATRICES, *_FLUX_FUSED]}
    | {
        f"{block}.norm.{one}_norm.weight": ("norm", whole)
        for block in ("double_blocks.*.img_attn", "double_blocks.*.txt_attn", "single_blocks.*")
        for one in ("query", "key")
    },
}
"""torchtitan's models: name, numbers collapsed -> role and the runs of tiles along every dim."""

Row = tuple[Shape, str, Shape]
HEADS, KV_HEADS = 6, 2
CONFIG = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": 32,
}


def llama(head: int = 8) -> dict[str, Row]:
    q, kv = HEADS * head, KV_HEADS * head
    return {
        "model.embed_tokens.weight": ((32, 48), "token", (32, 1)),
        "model.layers.*.self_attn.q_proj.weight": ((q, 48), "query", (6, 1)),
        "model.layers.*.self_attn.k_proj.weight": ((kv, 48), "key", (2, 1)),
        "model.layers.*.self_attn.v_proj.weight": ((kv, 48), "value", (kv, 1)),
        "model.layers.*.self_attn.o_proj.weight": ((48, q), "neuron", (48, 1)),
        "model.layers.*.mlp.gate_proj.weight": ((40, 48), "neuron", (40, 1)),
        "model.layers.*.mlp.up_proj.weight": ((40, 48), "neuron", (40, 1)),
        "model.layers.*.mlp.down_proj.weight": ((48, 40), "neuron", (48, 1)),
        "model.layers.*.input_layernorm.weight": ((48,), "norm", (1,)),
        "model.layers.*.post_attention_layernorm.weight": ((48,), "norm", (1,)),
        "model.norm.weight": ((48,), "norm", (1,)),
        "lm_head.weight": ((32, 48), "token", (32, 1)),
    }


def _with_experts(experts: dict[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in llama().items() if ".mlp." not in name} | experts


def _gpt2(transposed: bool, bias: bool) -> dict[str, Row]:
    turn, grid = (lambda *size: size[::-1] if transposed else size), ".T" * transposed
    table: dict[str, Row] = {
        "transformer.wte.weight": ((32, 48), "token", (32, 1)),
        "transformer.wpe.weight": ((16, 48), "token", (16, 1)),
        "transformer.h.*.attn.c_attn.weight": (turn(144, 48), f"qkv{grid}", turn(60, 1)),
        "transformer.h.*.attn.c_proj.weight": (turn(48, 48), f"neuron{grid}", turn(48, 1)),
        "transformer.h.*.mlp.c_fc.weight": (turn(192, 48), f"neuron{grid}", turn(192, 1)),
        "transformer.h.*.mlp.c_proj.weight": (turn(48, 192), f"neuron{grid}", turn(48, 1)),
        **{f"transformer.{ln}.weight": ((48,), "norm", (1,)) for ln in ("h.*.ln_1", "h.*.ln_2", "ln_f")},
    }
    sizes = {"attn.c_attn": 144, "attn.c_proj": 48, "mlp.c_fc": 192, "mlp.c_proj": 48, "ln_1": 48, "ln_2": 48}
    biases = {f"transformer.h.*.{name}.bias": ((size,), "bias", (size,)) for name, size in sizes.items()}
    return table | (biases | {"transformer.ln_f.bias": ((48,), "bias", (48,))} if bias else {})


_QKV_BIAS: dict[str, Row] = {
    f"model.layers.*.self_attn.{one}_proj.bias": ((size,), "bias", (size,))
    for one, size in (("q", 48), ("k", 16), ("v", 16))
}
_QK_NORM: dict[str, Row] = {f"model.layers.*.self_attn.{one}_norm.weight": ((12,), "norm", (1,)) for one in "qk"}

HUGGING_FACE: dict[str, tuple[dict[str, Any], dict[str, Row]]] = {
    "Llama": (CONFIG, llama()),
    "Mistral": (CONFIG, llama()),
    "Qwen2": (CONFIG, llama() | _QKV_BIAS),
    "Qwen3": (CONFIG | {"head_dim": 12}, llama(12) | _QK_NORM),
    "Mixtral": (
        CONFIG | {"num_local_experts": 3},
        _with_experts(
            {
                "model.layers.*.mlp.gate.weight": ((3, 48), "neuron", (3, 1)),
                "model.layers.*.mlp.experts.gate_up_proj": ((3, 80, 48), "experts", (3, 80, 1)),
                "model.layers.*.mlp.experts.down_proj": ((3, 48, 40), "experts", (3, 48, 1)),
            }
        ),
    ),
    "GPT2": ({"n_embd": 48, "n_layer": 2, "n_head": HEADS, "vocab_size": 32, "n_positions": 16}, _gpt2(True, True)),
}
"""transformers' class prefix -> (config, name -> (shape, role, shape of the block grid))."""

OTHERS: dict[str, tuple[dict[str, Any], dict[str, Row]]] = {
    "Mixtral before fused experts": (
        CONFIG | {"num_local_experts": 3},
        _with_experts(
            {
                "model.layers.*.block_sparse_moe.gate.weight": ((3, 48), "neuron", (3, 1)),
                "model.layers.*.block_sparse_moe.experts.*.w1.weight": ((40, 48), "neuron", (40, 1)),
                "model.layers.*.block_sparse_moe.experts.*.w2.weight": ((48, 40), "neuron", (48, 1)),
                "model.layers.*.block_sparse_moe.experts.*.w3.weight": ((40, 48), "neuron", (40, 1)),
            }
        ),
    ),
    "nanoGPT": ({"n_head": HEADS}, _gpt2(False, False)),
    "nanoGPT with biases": ({"n_head": HEADS}, _gpt2(False, True)),
}
"""Names that an installed transformers does not have."""

"""The table of rules: the roles of parameter names in known transformers.

A pattern is a glob, matched against the full name or any dotted suffix of it, so it always starts at a component.
A rule of this table applies only if its role fits the tensor's number of dims: `*norm*.weight` means vectors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import cache

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"})
_GLOB = re.compile(r"[*?[]")
_ADAPTED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


@dataclass(frozen=True)
class Rule:
    """Parameters whose name matches `pattern` have `role`.

    `orientation` names the evidence, in the model's other shapes, that shows whether the tensor is transposed
    ("" if it never is); `custom` marks rules added by the user; `writes` marks matrices whose outputs are added to the
    residual stream.
    """

    pattern: str
    role: str
    orientation: str = ""
    custom: bool = False
    writes: bool = False


def clean_name(name: str) -> str:
    """The name without the components added by torch.compile, checkpointing, FSDP and DDP wrappers."""
    *path, last = name.split(".")
    return ".".join([part for part in path if part not in WRAPPERS] + [last])


def collapse(name: str) -> str:
    """The name with numbers replaced by `*`, equal for all layers."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def matches(pattern: str, name: str) -> bool:
    """Whether the glob matches the name or a dotted suffix of it. An adapted base layer also matches by its plain
    name."""
    return any(_compiled(pattern).match(known) for known in _known_as(name))


def _known_as(name: str) -> tuple[str, ...]:
    """The name, and the name without components added by an adapter library."""
    plain = _ADAPTED.sub("", name)
    return (name,) if plain == name else (name, plain)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(r"(?s:.*\.)?" + translate(pattern))


class Index:
    """Finds the rules that match a name without trying every one: a model may have 50,000 parameters."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)
        self._literal: dict[str, list[int]] = {}
        self._globs: list[tuple[int, re.Pattern[str]]] = []
        for number, rule in enumerate(rules):
            if _GLOB.search(rule.pattern):
                self._globs.append((number, _compiled(rule.pattern)))
            else:
                self._literal.setdefault(rule.pattern, []).append(number)

    def matching(self, name: str) -> list[Rule]:
        """All rules whose pattern matches the cleaned name, in order."""
        found: set[int] = set()
        for known in _known_as(name):
            found.update([number for number, regex in self._globs if regex.match(known)])
            parts = known.split(".")
            for first in range(len(parts)):
                found.update(self._literal.get(".".join(parts[first:]), ()))
        return [self._rules[number] for number in sorted(found)]


# role -> projections of attention, whose low-rank adapters follow the projection they adapt
ATTENTION: dict[str, str] = {
    "query": "wq wq_b q_proj q_b_proj c_q self.query attention.query SelfAttention.q EncDecAttention.q q_lin",
    "key": "wk k_proj c_k self.key attention.key SelfAttention.k EncDecAttention.k k_lin",
    "value": "wv v_proj c_v self.value attention.value SelfAttention.v EncDecAttention.v v_lin",
    "qkv": "attn.c_attn self_attn.qkv_proj attn.qkv *_attn.qkv attn.Wqkv",
    "qkv_grouped": "qkv_linear.wqkv attention.query_key_value self_attention.query_key_value linear_qkv",
    "qkv_mlp": "single_blocks.*.linear1",
    "latent_kv_in": "wkv_a kv_a_proj_with_mqa",
    "latent_kv_out": "wkv_b kv_b_proj",
}

# role -> other modules, whose parameter is called `weight`
MODULES: dict[str, str] = {
    "token": (
        "tok_embeddings output lm_head wte wpe embed_tokens embed_positions embed_in embed_out tokens_embed shared "
        "word_embeddings position_embeddings token_type_embeddings position_embedding token_embedding positions_embed "
        "pos_embed tile_embedding *positional_embedding.embedding"
    ),
    "norm": "*norm* *layrnorm ln_* ln[0-9] *_ln *Norm*",
    "convolution": "patch_embeddings.projection patch_embed.proj patch_embedding patch_conv conv1 conv2 conv1d",
    "experts": "block_sparse_moe.input_linear block_sparse_moe.output_linear",
    "bias": "relative_attention_bias",
    "neuron": (
        # attention: the output, and the way down into a latent
        "wo o_proj out_proj wq_a q_a_proj SelfAttention.o EncDecAttention.o attention.output.dense "
        "attention.dense self_attention.dense self_attn.dense attn.proj *_attn.proj out_lin self_attn.projection "
        "attention.projection_layer "
        # MLP
        "w1 w2 w3 gate_proj up_proj down_proj mlp.gate_up_proj fc1 fc2 fc_in fc_out dense_h_to_4h dense_4h_to_h "
        "intermediate.dense intermediate_query.dense output.dense output_query.dense wi wi_0 wi_1 lin1 lin2 "
        "linear1 linear2 mlp.linear_fc2 "
        # routers
        "router.gate moe.gate mlp.gate block_sparse_moe.gate mlp.router feed_forward.router block_sparse_moe.router "
        "shared_expert_gate "
        # before and in place of the output head
        "pooler.dense transform.dense lm_head.dense vocab_transform classifier score text_model.head "
        # from one modality to another
        "linear_1 linear_2 linear_fc1 linear_fc2 visual_projection text_projection language_projection enc_to_dec_proj "
        "multi_modal_projector multi_modal_projector.linear modality_projection.proj merger.mlp.[0-9] merging_layer "
        "patch_embedding.linear "
        # flux: projections in, modulation, MLP, out
        "img_in txt_in time_in.in_layer time_in.out_layer vector_in.in_layer vector_in.out_layer *_mod.lin "
        "modulation.lin adaLN_modulation.[0-9] img_mlp.0 txt_mlp.0 img_mlp.2 txt_mlp.2 "
        "final_layer.linear"
    ),
}

# role -> parameters by their full last names
PARAMETERS: dict[str, str] = {
    "bias": (
        "bias *_bias *experts.mlp1_bias_EG *experts.mlp2_bias_ED sinks logit_scale bias_k bias_v "
        "*positional_embedding.gate gate_attn gate_ffn cross_attn_attn_gate cross_attn_mlp_gate"
    ),
    "experts": (
        "*experts.w[13] *experts.w2 *experts.w[13]_EFD *experts.w2_EDF "
        "*experts.mlp1_weight *experts.mlp2_weight *experts.mlp1_weight_EGD *experts.mlp2_weight_EDF"
    ),
    "token": (
        "position_embeddings position_embedding positional_embedding_vlm *positional_embedding.embedding pos_embed "
        "cls_token mask_token class_embedding query_tokens probe"
    ),
    # torch.nn.MultiheadAttention
    "qkv": "in_proj_weight",
    "query": "q_proj_weight",
    "key": "k_proj_weight",
    "value": "v_proj_weight",
    "neuron.T": "mm_input_projection_weight",
    "norm": "*norm*.scale *.gamma *.lambda1 *.lambda_[12] *lora_magnitude_vector* class_embedding",
}

# (pattern, role, evidence in `orientation.py`): matrices that some libraries store [out, in] and others [in, out]
EITHER_ORIENTATION: tuple[tuple[str, str, str], ...] = (
    ("attn.c_attn.weight", "qkv", "c_attn"),
    ("attn.c_proj.weight", "neuron", "c_attn"),
    ("mlp.c_fc.weight", "neuron", "c_attn"),
    ("mlp.c_proj.weight", "neuron", "c_attn"),
    ("experts.gate_up_proj", "experts", "experts"),
    ("experts.down_proj", "experts", "experts"),
)

# modules, and full last names, whose output is added to the residual stream: outputs of attention, MLPs, experts
_WRITING = (
    "wo o_proj out_proj SelfAttention.o EncDecAttention.o attention.output.dense attention.dense self_attention.dense "
    "self_attn.dense attn.proj *_attn.proj out_lin self_attn.projection attention.projection_layer attn.c_proj "
    "w2 down_proj fc2 fc_out dense_4h_to_h output.dense output_query.dense lin2 linear2 mlp.linear_fc2 mlp.c_proj "
    "img_mlp.2 txt_mlp.2 block_sparse_moe.output_linear",
    "*experts.w2 *experts.w2_EDF *experts.mlp2_weight *experts.mlp2_weight_EDF experts.down_proj",
)
WRITES = frozenset([*(f"{module}.weight" for module in _WRITING[0].split()), *_WRITING[1].split()])
"""Patterns of the matrices whose outputs are added to the residual stream."""


def _transformer_rules() -> Iterator[Rule]:
    # adapters first: `q_proj.lora_B` is not a whole query
    for pattern in ("lora_[Aa].*weight", "lora_embedding_[AB].*", "lora_embedding_[AB]"):
        yield Rule(pattern, "neuron")
    for role, modules in ATTENTION.items():
        for module in modules.split():
            yield Rule(f"{module}.lora_[Bb].*weight", role)
    yield Rule("lora_[Bb].*weight", "neuron")
    for pattern, role, evidence in EITHER_ORIENTATION:
        yield Rule(pattern, role, evidence)
    for role, names in PARAMETERS.items():
        for name in names.split():
            yield Rule(name, role)
    for table in (ATTENTION, MODULES):
        for role, modules in table.items():
            for module in modules.split():
                yield Rule(f"{module}.weight", role)


TRANSFORMER: tuple[Rule, ...] = tuple(replace(rule, writes=rule.pattern in WRITES) for rule in _transformer_rules())
"""The rules of `Partition.transformer`, in order; the first that matches wins."""

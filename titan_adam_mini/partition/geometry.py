"""The attention heads of a model and of the models inside it, and how many rows of a projection one head has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# field -> its names: torchtitan's model args first, then Hugging Face's configs, T5's last
_ALIASES: dict[str, tuple[str, ...]] = {
    "n_heads": ("n_heads", "num_attention_heads", "n_head", "num_heads", "attention_heads"),
    "n_kv_heads": ("n_kv_heads", "num_key_value_heads", "num_kv_heads", "n_kv_head"),
    "head_dim": ("head_dim", "d_kv"),
    "qk_nope_head_dim": ("qk_nope_head_dim",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
    "kv_lora_rank": ("kv_lora_rank",),
}

_PART = re.compile(r"(.+)_config|((?:.+_)?(?:encoder|decoder))")
"""Fields of a config that contain another model's config: `vision_config`, and plain `encoder` and `decoder`."""
_SIDE_HEADS = re.compile(r"(?:num_)?((?:\w+_)?(?:encoder|decoder))_(?:num_)?attention_heads")
_SYNONYMS = {"text": "language", "vision": "visual"}
"""Hugging Face calls the model of `text_config` `text_model` or `language_model`, of `vision_config` also `visual`."""

NEEDS_HEADS = (
    "the number of heads is needed: pass n_heads (and n_kv_heads where keys have fewer heads), or head_dim, or give "
    "the parameter the role 'rows:N' with N rows per head"
)


@dataclass(frozen=True)
class Geometry:
    """The head counts and sizes of a model; None if unknown.

    Rows per head are never derived from `dim / n_heads`: they are a projection's rows divided by its heads.
    If a model has both `qk_nope_head_dim` and `qk_rope_head_dim` (multi-head latent attention), a query head
    has the sum of the two rows, and `head_dim` is not used: configs of such models use it for the rotary part.

    `parts` are models inside the model, each with its own geometry: `{"vision": Geometry(n_heads=16)}`. A
    parameter belongs to a part if a component of its name is the part's name or begins with it and an underscore
    (`vision_tower.encoder.layers.0...`); "text" also means `language`, and "vision" `visual`. The first such component
    decides. Parameters that belong to no part use the heads of this geometry itself.

    Raises ValueError for a number that is not a positive integer.
    """

    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    kv_lora_rank: int | None = None
    parts: Mapping[str, Geometry] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for number in _ALIASES:
            value = getattr(self, number)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{number} must be a positive integer or None, not {value!r}")
        object.__setattr__(self, "parts", dict(self.parts))

    @staticmethod
    def of(config: Any) -> Geometry:
        """Read the heads from torchtitan model args or a Hugging Face config, an object or a dict.

        Configs inside the config (`text_config`, `vision_config`, `encoder`, ...) become `parts`; a single one in a
        config without heads of its own is the full model. Encoder and decoder also become parts if the config counts
        their heads separately (`encoder_attention_heads`). torchtitan 0.3's configs are read through their first
        attention.
        """
        numbers: dict[str, Any] = {number: _first(config, names) for number, names in _ALIASES.items()}
        if numbers["n_heads"] is None and (attention := _get(config, "first_attention")) is not None:
            return Geometry.of(attention)
        if _get(config, "multi_query") is True and not _get(config, "new_decoder_architecture"):
            numbers["n_kv_heads"] = 1  # Falcon and GPTBigCode also have the count of ungrouped heads
        if numbers["head_dim"] is None and (axes := _get(config, "axes_dim")):
            numbers["head_dim"] = sum(axes)  # flux: the rotary axes add up to one head
        # DeepSeek has 0 for a missing projection, Swin a list with one number per stage
        numbers = {name: None if isinstance(n, (list, tuple)) else n or None for name, n in numbers.items()}
        own = Geometry(**numbers)
        if sides := dict(_sides(config, own)):  # transformers repeats the encoder's heads as the model's
            side, *others = set(sides.values())
            own = replace(own, n_heads=None, n_kv_heads=None) if others else side
        parts = dict(_parts(config)) | sides
        if own.n_heads is None and len(parts) == 1:
            return next(iter(parts.values()))
        return replace(own, parts=parts)

    def part_of(self, name: str) -> tuple[str, Geometry]:
        """The part that a parameter of this name belongs to, as a dotted path, and its geometry; "" for none."""
        components = name.split(".")
        for position, component in enumerate(components):
            if matching := [part for part in self.parts if _belongs_to(part, component)]:
                part = max(matching, key=len)
                inner, geometry = self.parts[part].part_of(".".join(components[position + 1 :]))
                return f"{part}.{inner}".rstrip("."), geometry
        return "", self

    @property
    def qk_head_dim(self) -> int | None:
        """Rows of one query or key head if the model states them."""
        if self.qk_nope_head_dim and self.qk_rope_head_dim:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim

    def query_head(self, rows: int) -> int:
        """Rows of one head of a query projection of `rows` rows."""
        return _rows_per_head(rows, self.n_heads, self.qk_head_dim, "n_heads")

    def key_head(self, rows: int) -> int:
        """Rows of one head of a key projection; n_kv_heads defaults to n_heads unless head_dim is known."""
        if self.n_kv_heads is None and self.qk_head_dim is None:
            return _rows_per_head(rows, self.n_heads, None, "n_kv_heads (by default n_heads)")
        return _rows_per_head(rows, self.n_kv_heads, self.qk_head_dim, "n_kv_heads")

    def query_or_key_head(self, rows: int) -> int:
        """Rows of one head of a projection that may be either: needs a head size, or equal head counts."""
        if self.qk_head_dim is None and self.n_kv_heads not in (None, self.n_heads):
            raise ValueError(
                f"queries have {self.n_heads} heads and keys {self.n_kv_heads}, and this role does not specify "
                "which it is: pass head_dim, or give it the role 'query' or 'key'"
            )
        return _rows_per_head(rows, None if self.qk_head_dim else self.n_heads, self.qk_head_dim, "n_heads")

    def fused_heads(self, rows: int, inputs: int) -> tuple[int, int, int]:
        """(query heads, key heads, rows per head) of a tensor whose `rows` are queries, keys and values.

        Without n_kv_heads and head_dim only the plain case is accepted: as many keys and values as queries, and
        as many queries as inputs, so rows = 3 * inputs.
        """
        if self.n_heads is None:
            raise ValueError("a fused projection needs n_heads (and n_kv_heads where keys have fewer heads)")
        kv, size = self.n_kv_heads, self.head_dim
        if kv is None and size is not None and rows % size == 0 and (rows // size - self.n_heads) % 2 == 0:
            kv = (rows // size - self.n_heads) // 2
        if kv is None:
            kv = self.n_heads
            if size is None and rows != 3 * inputs:
                raise ValueError(f"without n_kv_heads its {rows} rows should be 3 x {inputs} inputs: pass n_kv_heads")
        heads = self.n_heads + 2 * kv
        if kv < 1 or rows % heads or size not in (None, rows // heads):
            raise ValueError(
                f"{rows} rows are not {self.n_heads} query, {kv} key and {kv} value heads"
                + (f" of {size} rows" if size else " of equal size")
                + ": check n_heads, n_kv_heads and head_dim"
            )
        return self.n_heads, kv, rows // heads

    def require(self, *names: str) -> tuple[int, ...]:
        """The values of these fields; ValueError naming those that are None."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"the model's {', '.join(missing)} must be known: build the partition from the model's config, or pass "
                f"Geometry({', '.join(f'{name}=...' for name in missing)})"
            )
        return tuple(getattr(self, name) for name in names)

    def __str__(self) -> str:
        numbers = [f"{number}={value}" for number in _ALIASES if (value := getattr(self, number)) is not None]
        parts = [f"{name} ({part})" for name, part in self.parts.items()]
        return ", ".join(numbers + parts) or "no heads given"


def _rows_per_head(rows: int, heads: int | None, size: int | None, which: str) -> int:
    if heads is None and size is None:
        raise ValueError(NEEDS_HEADS)
    if heads is not None and rows % heads:
        raise ValueError(f"{rows} rows are not divisible by {which} = {heads}: pass the model's own number of heads")
    if heads is not None and size is not None and heads * size != rows:
        raise ValueError(
            f"{rows} rows are not {which} = {heads} heads of {size} rows each: correct one of the two, or give the "
            f"parameter the role 'rows:{rows // heads}' if that is the size of one block"
        )
    if heads is None and size is not None and rows % size:
        raise ValueError(f"{rows} rows are not divisible by head_dim = {size}: pass the model's own head_dim")
    return size or max(1, rows // (heads or 1))


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := _get(config, name)) is not None), None)


def _parts(config: Any) -> Iterator[tuple[str, Geometry]]:
    """The models inside a config, by field name without `_config`."""
    for name, value in _fields(config).items():
        match = _PART.fullmatch(str(name))
        if match and (isinstance(value, Mapping) or hasattr(value, "__dict__")) and not isinstance(value, type):
            geometry = Geometry.of(value)
            # a model has a type or heads; others are `quantization_config` and the like
            if geometry != Geometry() or _get(value, "model_type"):
                yield match[1] or match[2], geometry


def _sides(config: Any, own: Geometry) -> Iterator[tuple[str, Geometry]]:
    """Encoder and decoder of a config that counts their heads separately."""
    for name, heads in _fields(config).items():
        if (match := _SIDE_HEADS.fullmatch(str(name))) and isinstance(heads, int) and heads:
            yield match[1], replace(own, n_heads=heads, n_kv_heads=_get(config, f"{match[1]}_num_key_value_heads"))


def _fields(config: Any) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


def _belongs_to(part: str, component: str) -> bool:
    """Whether a component of a parameter's name belongs to this part."""
    words = (part, _SYNONYMS.get(part, part))
    return component in words or component.startswith(tuple(f"{word}_" for word in words))

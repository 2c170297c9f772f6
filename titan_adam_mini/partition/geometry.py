"""What a model says about its heads, and how many rows of a projection one head has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

# field -> the names it goes by: torchtitan's model args first, then Hugging Face's configs, T5's last
_ALIASES: dict[str, tuple[str, ...]] = {
    "n_heads": ("n_heads", "num_attention_heads", "n_head", "num_heads"),
    "n_kv_heads": ("n_kv_heads", "num_key_value_heads", "num_kv_heads", "n_kv_head"),
    "head_dim": ("head_dim", "d_kv"),
    "qk_nope_head_dim": ("qk_nope_head_dim",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
    "kv_lora_rank": ("kv_lora_rank",),
}

NEEDS_HEADS = "the number of heads is needed: pass n_heads (and n_kv_heads where keys have fewer heads), or head_dim"


@dataclass(frozen=True)
class Geometry:
    """The head counts and sizes of one model; None where the model does not say.

    Rows per head are never guessed from `dim / n_heads`: they are a projection's rows divided by its heads.
    Where a model has both `qk_nope_head_dim` and `qk_rope_head_dim` (multi-head latent attention), a query head
    has the sum of the two, and `head_dim` is not looked at: configs of such models use it for the rotary part.
    """

    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    kv_lora_rank: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{field.name} must be a positive integer or None, not {value!r}")

    @staticmethod
    def of(config: Any) -> Geometry:
        """Read the heads out of torchtitan model args or a Hugging Face config, an object or a dict.

        torchtitan 0.3's configs are asked for their first attention layer, and a lone `text_config` is followed. A
        config of several models (`text_config` beside `vision_config`) raises ValueError: one number of heads
        cannot serve them all.
        """
        found = {field: _first(config, names) for field, names in _ALIASES.items()}
        if found["n_heads"] is None and (parts := _parts(config)):
            if len(parts) > 1:
                raise ValueError(
                    f"the config holds {len(parts)} models ({', '.join(parts)}), whose heads may differ: build the "
                    "partition from one of them and give the other's projections a role of their own, such as 'rows:64'"
                )
            return Geometry.of(next(iter(parts.values())))
        if _get(config, "multi_query") is True and not _get(config, "new_decoder_architecture"):
            found["n_kv_heads"] = 1  # Falcon and GPTBigCode keep the count of ungrouped heads beside this flag
        if found["head_dim"] is None and (axes := _get(config, "axes_dim")):
            found["head_dim"] = sum(axes)  # flux: the rotary axes share out one head
        # DeepSeek writes 0 for "this projection is not there"
        return Geometry(**{field: value or None for field, value in found.items()})

    @property
    def qk_head_dim(self) -> int | None:
        """Rows of one query or key head where the model states them."""
        if self.qk_nope_head_dim and self.qk_rope_head_dim:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim

    def query_head(self, rows: int) -> int:
        """Rows of one head of a query projection of `rows` rows."""
        return _rows_per_head(rows, self.n_heads, self.qk_head_dim, "n_heads")

    def key_head(self, rows: int) -> int:
        """Rows of one head of a key projection; n_kv_heads, where not given, is n_heads unless head_dim is known."""
        if self.n_kv_heads is None and self.qk_head_dim is None:
            return _rows_per_head(rows, self.n_heads, None, "n_kv_heads, taken to be n_heads,")
        return _rows_per_head(rows, self.n_kv_heads, self.qk_head_dim, "n_kv_heads")

    def query_or_key_head(self, rows: int) -> int:
        """Rows of one head of a projection that may be either: needs a head size, or equally many heads."""
        if self.qk_head_dim is None and self.n_kv_heads not in (None, self.n_heads):
            raise ValueError(
                f"queries have {self.n_heads} heads and keys {self.n_kv_heads}, and this role does not say which it "
                "is: pass head_dim, or give it the role 'query' or 'key'"
            )
        return _rows_per_head(rows, None if self.qk_head_dim else self.n_heads, self.qk_head_dim, "n_heads")

    def fused_heads(self, rows: int, inputs: int) -> tuple[int, int, int]:
        """(query heads, key heads, rows per head) of a tensor whose `rows` are queries, keys and values.

        Without n_kv_heads and head_dim only the plain case is believed: as many keys and values as queries, and
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
                raise ValueError(
                    f"with n_kv_heads not given its {rows} rows should be 3 x {inputs} inputs: pass n_kv_heads"
                )
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
        said = [f"{field.name}={value}" for field in fields(self) if (value := getattr(self, field.name)) is not None]
        return ", ".join(said) or "no heads given"


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


def _parts(config: Any) -> dict[str, Any]:
    """The models inside a config that holds several, under their field's name."""
    names = ("first_attention", "text_config", "vision_config", "audio_config", "encoder", "decoder")
    return {name: part for name in names if (part := _get(config, name)) is not None}

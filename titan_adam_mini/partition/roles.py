"""The roles: a table from each role's name to the function that divides a tensor of that role into blocks.

Most roles only cut the *output* dim, and no other. The output dim is the first (torch's `Linear`, `[out, in]`) or, for
a role written with `.T`, the last (`[in, out]`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from titan_adam_mini.layout import BlockLayout, Run
from titan_adam_mini.partition.geometry import Geometry

Shape = tuple[int, ...]
VALUE_BLOCKS = ("neuron", "tensor")
SECOND_MOMENTS = ("blocks", "channels", "factored")
CHANNELS, FACTORED = SECOND_MOMENTS[1:]
TRANSPOSED = ".T"


@dataclass(frozen=True)
class Model:
    """What the roles need besides a shape: the heads, and whether values are cut by neuron or not at all."""

    geometry: Geometry = field(default_factory=Geometry)
    value_blocks: str = "neuron"

    def values(self, rows: int) -> Run:
        """The run of `rows` consecutive value rows."""
        return (rows, 1) if self.value_blocks == "neuron" else (1, rows)


Cut = Callable[[int, int, Model], Sequence[Run]]
"""(size of the output dim, size of the input dims together, model) -> runs along the output dim."""


@dataclass(frozen=True)
class Role:
    """One row of the table of roles.

    Attributes:
        blocks: a description.
        dims: the numbers of dims that a tensor of this role may have.
        layout: (shape, model, transposed) -> blocks.
        matrix: whether it is a matrix, or a stack of them, which may be transposed or factored.
    """

    blocks: str
    dims: range
    layout: Callable[[Shape, Model, bool], BlockLayout]
    matrix: bool = False


def _neurons(rows: int, inputs: int, model: Model) -> Sequence[Run]:
    return [(rows, 1)]


def _queries(rows: int, inputs: int, model: Model) -> Sequence[Run]:
    size = model.geometry.query_head(rows)
    return [(rows // size, size)]


def _keys(rows: int, inputs: int, model: Model) -> Sequence[Run]:
    size = model.geometry.key_head(rows)
    return [(rows // size, size)]


def _queries_or_keys(rows: int, inputs: int, model: Model) -> Sequence[Run]:
    size = model.geometry.query_or_key_head(rows)
    return [(rows // size, size)]


def _values(rows: int, inputs: int, model: Model) -> Sequence[Run]:
    return [model.values(rows)]


def _qkv(rows: int, inputs: int, model: Model) -> Sequence[Run]:
    heads, kv_heads, size = model.geometry.fused_heads(rows, inputs)
    return [(heads, size), (kv_heads, size), model.values(kv_heads * size)]


def _qkv_grouped(rows: int, inputs: int, model: Model) -> Sequence[Run]:
    heads, kv_heads, size = model.geometry.fused_heads(rows, inputs)
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not divisible by {kv_heads} key heads: check n_kv_heads")
    return [(heads // kv_heads, size), (1, size), model.values(size)] * kv_heads


def _qkv_mlp(rows: int, inputs: int, model: Model) -> Sequence[Run]:
    heads, size = model.geometry.require("n_heads", "head_dim")
    attention = (heads + 2 * (model.geometry.n_kv_heads or heads)) * size
    if attention > rows:
        raise ValueError(f"its {rows} rows are fewer than the {attention} of queries, keys and values")
    return [*_qkv(attention, inputs, model), (rows - attention, 1)]


def _latent_kv_in(rows: int, inputs: int, model: Model) -> Sequence[Run]:
    latent, rope = model.geometry.require("kv_lora_rank", "qk_rope_head_dim")
    return [(latent, 1), (1, rope)]


def _latent_kv_out(rows: int, inputs: int, model: Model) -> Sequence[Run]:
    heads, nope, value = model.geometry.require("n_heads", "qk_nope_head_dim", "v_head_dim")
    return [(1, nope), model.values(value)] * heads


def _matrix(cut: Cut) -> Callable[[Shape, Model, bool], BlockLayout]:
    """Cut the output dim only."""

    def layout(shape: Shape, model: Model, transposed: bool) -> BlockLayout:
        out = len(shape) - 1 if transposed else 0
        inputs = 1
        for dim, size in enumerate(shape):
            inputs *= 1 if dim == out else size
        runs = list(cut(shape[out], inputs, model))
        return BlockLayout.of(shape, *(runs if dim == out else None for dim in range(len(shape))))

    return layout


def _token(shape: Shape, model: Model, transposed: bool) -> BlockLayout:
    if transposed:
        return BlockLayout.of(shape, None, *(1 for _ in shape[1:]))
    return BlockLayout.of(shape, *(1 for _ in shape[:-1]), None)


def _experts(shape: Shape, model: Model, transposed: bool) -> BlockLayout:
    return BlockLayout.of(shape, 1, None, 1) if transposed else BlockLayout.of(shape, 1, 1, None)


def _rows_of_matrices(shape: Shape, model: Model, transposed: bool) -> BlockLayout:
    return BlockLayout.of(shape, *(1 for _ in shape[:-1]), None if factors(shape) else 1)


def factors(shape: Shape) -> tuple[BlockLayout, ...]:
    """The grids of a factored second moment besides its rows: the columns, and the full matrix; per matrix of a stack.

    The second moment of an element is that of its row times that of its column divided by that of the matrix
    (Adafactor, arXiv 1804.04235, section 3). Empty for a matrix of one row or column, where this is the element's own.
    """
    if 1 in shape[-2:]:
        return ()
    stack = [1 for _ in shape[:-2]]
    return BlockLayout.of(shape, *stack, None, 1), BlockLayout.of(shape, *stack, None, None)


def _whole(shape: Shape, model: Model, transposed: bool) -> BlockLayout:
    return BlockLayout.of(shape, *(None for _ in shape))


def _elementwise(shape: Shape, model: Model, transposed: bool) -> BlockLayout:
    return BlockLayout.of(shape, *(1 for _ in shape))


_MATRIX, _VECTOR, _ANY = range(2, 3), range(2), range(100)

TABLE: Mapping[str, Role] = {
    "token": Role("one per row: embeddings, output head, learned positions", range(2, 100), _token, True),
    "query": Role("one per query head: rows / n_heads, or head_dim, rows", _MATRIX, _matrix(_queries), True),
    "key": Role("one per key head: rows / n_kv_heads, or head_dim, rows", _MATRIX, _matrix(_keys), True),
    "query_key": Role("one per head, of queries or keys", _MATRIX, _matrix(_queries_or_keys), True),
    "value": Role("one per output neuron; one per tensor if value_blocks='tensor'", _MATRIX, _matrix(_values), True),
    "neuron": Role("one per output neuron (row)", _MATRIX, _matrix(_neurons), True),
    "experts": Role("one per expert and output neuron of an [expert, out, in] tensor", range(3, 4), _experts, True),
    "qkv": Role("queries, keys, values concatenated, each with its own blocks", _MATRIX, _matrix(_qkv), True),
    "qkv_grouped": Role(
        "per key head: its query heads, the key head, its values (one block per key head if value_blocks='tensor')",
        _MATRIX,
        _matrix(_qkv_grouped),
        True,
    ),
    "qkv_mlp": Role("queries, keys, values, then MLP neurons", _MATRIX, _matrix(_qkv_mlp), True),
    "latent_kv_in": Role(
        "latent attention, down: kv_lora_rank neurons, then one block of qk_rope_head_dim rows",
        _MATRIX,
        _matrix(_latent_kv_in),
        True,
    ),
    "latent_kv_out": Role(
        "latent attention, up: per head one key block of qk_nope_head_dim rows, then v_head_dim value neurons "
        "(one block if value_blocks='tensor')",
        _MATRIX,
        _matrix(_latent_kv_out),
        True,
    ),
    FACTORED: Role(
        "row means times column means, as in Adafactor (arXiv 1804.04235): of a matrix, or of each expert",
        range(2, 4),
        _rows_of_matrices,
    ),
    "convolution": Role("one per output channel (first dim)", range(3, 6), _matrix(_neurons)),
    "norm": Role("one per vector: norms and other vectors", _VECTOR, _whole),
    "bias": Role("one per element, plain Adam: biases, per-head scalars", _ANY, _elementwise),
    "tensor": Role("one per tensor", _ANY, _whole),
}

ROWS = "rows:N"
ROLES: Mapping[str, str] = {name: role.blocks for name, role in TABLE.items()} | {
    ROWS: "one per N consecutive rows, such as 'rows:64'"
}
"""Role -> a description of its blocks. A role of a matrix may end in `.T`: outputs along the last dim."""

HEADED = frozenset({"query", "key", "query_key", "qkv", "qkv_grouped"})
"""Roles whose first tile is one head."""


BY_ROW = frozenset({"query", "key", "query_key", "qkv", "qkv_grouped", "qkv_mlp", "latent_kv_in", "latent_kv_out"})
"""Roles of attention projections, which by channel have one block per row."""


def by_channel(role: str, writes: bool) -> str:
    """The role with one block per channel: along the dim of a matrix that is not the residual stream's.

    Args:
        role: with `.T` if outputs lie along the last dim.
        writes: whether the matrix's outputs are added to the residual stream.
    """
    name = role.removesuffix(TRANSPOSED)
    turned = (name != role) != writes
    return ("neuron" if name in BY_ROW else name) + TRANSPOSED * turned


def find(role: str) -> tuple[Role, bool]:
    """The table's row of a role, and whether it is transposed; ValueError listing the valid names."""
    name = role.removesuffix(TRANSPOSED) if isinstance(role, str) else ""
    transposed = name != role
    row = _row(name)
    if row is None or (transposed and not row.matrix):
        raise ValueError(f"unknown role {role!r}; {valid_roles()}")
    return row, transposed


def known(role: str) -> bool:
    """Whether this is the name of a role, without `.T`."""
    return _row(role) is not None


def layout(role: str, shape: Shape, model: Model) -> BlockLayout:
    """The blocks of a tensor of this role and shape; ValueError if the role does not fit the shape."""
    row, transposed = find(role)
    if len(shape) not in row.dims:
        bound = "exactly" if len(row.dims) == 1 else "at least" if len(shape) < row.dims.start else "at most"
        limit = row.dims.start if len(shape) < row.dims.start else row.dims.stop - 1
        slices = ", perhaps a flattened slice, as made by FSDP1 and DeepSpeed ZeRO" * (len(shape) == 1)
        raise ValueError(f"this role is for tensors of {bound} {limit} dims, but this one has {len(shape)}{slices}")
    return row.layout(shape, model, transposed)


def valid_roles() -> str:
    """A sentence that lists them all."""
    return f"valid roles are {', '.join(ROLES)}; a matrix stored [in, out] needs {TRANSPOSED} after its role"


def _row(name: str) -> Role | None:
    size = name.removeprefix("rows:")
    return _rows(int(size)) if size != name and size.isdecimal() and int(size) else TABLE.get(name)


def _rows(size: int) -> Role:
    def cut(rows: int, inputs: int, model: Model) -> Sequence[Run]:
        if rows % size:
            raise ValueError(f"{rows} rows are not divisible by {size}")
        return [(rows // size, size)]

    return Role(f"one per {size} consecutive rows", range(2, 3), _matrix(cut), True)

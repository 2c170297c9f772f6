"""The bytes that any rank of a run holds, from shapes, placements and meshes alone: pure arithmetic, no process group.

torchtitan's meshes are row-major unflattenings of the ranks, so where a rank stands on a mesh follows from its number
and the axis's stride; the thousand ranks of a pipeline stage need the model of one of them only.

Bytes are the sum of local elements x bytes per element. What memory is taken beyond them has columns of its own:

    padding    FSDP2 keeps every shard of a parameter, and of its gradient, as long as the first rank's
               (torch/distributed/fsdp/_fully_shard: `padded_sharded_param_size`; gradients of one FSDP group are views
               of one buffer, the output of their reduce-scatter)
    rounding   CUDA's caching allocator gives out multiples of 512 bytes (c10/cuda/CUDACachingAllocator: kMinBlockSize)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from math import prod

import torch
from torch.distributed.tensor import Placement

from ..kernels import int8
from ..layout import BlockLayout
from ..momentum import TYPES, dtype_of
from ..partition import Blocks
from ..plan import BlockPlan
from ..sharding import Axis, Shard, box_shape

ROUNDING = 512
"""Bytes: every tensor on a CUDA device takes a multiple of them."""
STEP = 4
"""Bytes of `step`: one float32 per parameter, on every rank, with every optimizer."""
ADAMW = "adamw"
"""Its key among `optimizers_of`."""


@dataclass(frozen=True)
class Mesh:
    """A device mesh that every rank of a pipeline stage has one like.

    Attributes:
        names: of its axes.
        sizes: number of ranks along each.
        strides: difference between the numbers of neighbouring ranks along each.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Where a rank stands on its own mesh of this kind."""
        return tuple(rank // stride % size for size, stride in zip(self.sizes, self.strides, strict=True))

    def axes(self, rank: int) -> tuple[Axis, ...]:
        """The axes of more than one rank, as `sharding.axes_of` gives them on that rank."""
        return tuple(
            Axis(index, tuple(rank + (step - place) * stride for step in range(size)))
            for index, (size, stride, place) in enumerate(
                zip(self.sizes, self.strides, self.coordinate(rank), strict=True)
            )
            if size > 1
        )


ALONE = Mesh((), (), ())
"""The mesh of a plain tensor."""


@dataclass(frozen=True)
class Kind:
    """What parameters that are stored alike share, whatever their names.

    Attributes:
        shape: of the whole tensor.
        dtype: of the parameter and its gradient.
        placements: DTensor placements, one per axis of `mesh`.
        mesh: the mesh it lives on.
        layouts: its block grids; none for a frozen parameter, which has neither gradient nor state.
        fsdp: the mesh axis along which FSDP2 shards it; None if FSDP2 does not manage it.
        whole_gradient: is its gradient not cut where it is cut? So torch leaves that of an embedding whose rows are
            shared out by tensor parallelism without FSDP.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...] = ()
    mesh: Mesh = ALONE
    layouts: tuple[BlockLayout, ...] = ()
    fsdp: int | None = None
    whole_gradient: bool = False

    @cached_property
    def cut_axes(self) -> frozenset[int]:
        """The mesh axes that cut it."""
        zero = (0,) * len(self.mesh.sizes)
        return frozenset(cut.axis for cut in Shard.of(self.shape, self.placements, self.mesh.sizes, zero).cuts)

    def place(self, rank: int) -> tuple[int, ...]:
        """The rank's coordinate on the mesh, with 0 along axes that do not cut: all that its part depends on."""
        return tuple(place if axis in self.cut_axes else 0 for axis, place in enumerate(self.mesh.coordinate(rank)))

    def shard(self, place: Sequence[int]) -> Shard:
        """What the rank at this place of the mesh holds."""
        return Shard.of(self.shape, self.placements, self.mesh.sizes, place)


@dataclass(frozen=True)
class Param:
    """One parameter of a model part.

    Attributes:
        name: without wrappers.
        kind: how it is stored.
        group: number of the FSDP group, unique in the stage, whose gradients share one buffer; None without FSDP2.
        blocks: role, layout and decay; None for a frozen parameter.
    """

    name: str
    kind: Kind
    group: int | None
    blocks: Blocks | None


@dataclass(frozen=True)
class Bytes:
    """Memory of some tensors.

    Attributes:
        bytes: local elements x bytes per element.
        padding: what FSDP2 adds to that.
        rounding: what the allocator adds to both.
    """

    bytes: int = 0
    padding: int = 0
    rounding: int = 0

    @staticmethod
    def of(numbers: Iterable[tuple[int, int]], times: int = 1, *, on_device: bool = True) -> Bytes:
        """Of storages, given as (bytes, bytes with padding) each, `times` over."""
        pairs = list(numbers)
        exact, padded = sum(one for one, _ in pairs), sum(two for _, two in pairs)
        rounding = sum(-two % ROUNDING for _, two in pairs) if on_device else 0
        return Bytes(times * exact, times * (padded - exact), times * rounding)

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Counts:
    """Elements of one parameter on one rank.

    Attributes:
        numel: of its part.
        padded: of its part with FSDP2's padding.
        grids: of its part of each block grid, the second moments.
        scales: of int8 momentum.
    """

    numel: int
    padded: int
    grids: tuple[int, ...]
    scales: int


@cache
def counts(kind: Kind, place: tuple[int, ...]) -> Counts:
    """The elements that the rank at `place` (see `Kind.place`) holds."""
    shard = kind.shard(place)
    local = box_shape(shard.box())
    grids = tuple(prod(BlockPlan.of(layout, shard).grid_shape) for layout in kind.layouts)
    return Counts(prod(local), prod(padded_shape(shard, kind.fsdp)), grids, _scales(kind.shape, local))


def padded_shape(shard: Shard, fsdp: int | None) -> tuple[int, ...]:
    """The shape of a rank's part as FSDP2, which makes the innermost cut of its dim on mesh axis `fsdp`, stores it."""
    shape = box_shape(shard.box())
    for dim, size in enumerate(shape):
        for level, cut in enumerate(shard.cuts_of(dim)):
            if cut.axis == fsdp:
                levels = [level if other == dim else len(shard.cuts) for other in range(len(shape))]
                start, stop = shard.box(levels)[dim]
                size = -(-(stop - start) // cut.size)
                return (*shape[:dim], size, *shape[dim + 1 :])
    return shape


def _scales(shape: tuple[int, ...], local: tuple[int, ...]) -> int:
    return prod(int8.scale_shape(local)) if int8.fits(shape) else 0


@dataclass(frozen=True)
class Optimizer:
    """An optimizer whose state is counted: AdamW, or AdamMini with a type of momentum.

    Attributes:
        title: for readers.
        mini: AdamMini?
        momentum: AdamMini's `momentum_dtype`; None is the parameter's own type.
        step_on_device: does `step` live on the accelerator? With fused implementations it does, else in host memory.
    """

    title: str
    mini: bool
    momentum: torch.dtype | None = None
    step_on_device: bool = True

    def tensors(self, kind: Kind, numel: int, grids: Iterable[int], scales: int) -> list[int]:
        """Bytes of each tensor of the state of one parameter with so many elements, but for `step`."""
        if not self.mini:
            return 2 * [numel * kind.dtype.itemsize]
        dtype = dtype_of(self.momentum, kind.dtype, kind.shape)
        second = 8 if kind.dtype == torch.float64 else 4
        state = [numel * dtype.itemsize, *(grid * second for grid in grids)]
        return [*state, scales * 4] if dtype == torch.int8 else state

    def whole(self, kind: Kind) -> int:
        """Bytes of the state of one parameter in a checkpoint, where every element is kept once."""
        if not kind.layouts:
            return 0
        scales, grids = _scales(kind.shape, kind.shape), [layout.num_blocks for layout in kind.layouts]
        return STEP + sum(self.tensors(kind, prod(kind.shape), grids, scales))


@dataclass(frozen=True)
class Held:
    """What one rank holds: memory of its parameters, gradients and buffers, and of each optimizer's state."""

    rank: int
    parameters: Bytes
    gradients: Bytes
    buffers: Bytes
    state: dict[str, Bytes]


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: ranks that hold the same parameters, or parts of them. Without pipelining, the whole run.

    Attributes:
        ranks: its ranks.
        parts: its model parts (several under schedules with virtual stages), each with an optimizer of its own.
        buffers: bytes of each of its buffers, the same on all its ranks.
    """

    ranks: range
    parts: tuple[tuple[Param, ...], ...]
    buffers: tuple[int, ...] = ()

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """The parameters of all its parts."""
        return tuple(param for part in self.parts for param in part)

    @cached_property
    def _kinds(self) -> Counter[Kind]:
        return Counter(param.kind for param in self.params)

    @cached_property
    def _gradient_buffers(self) -> Counter[tuple[Kind, ...]]:
        """The kinds of parameters whose gradients share one storage -> number of such storages."""
        groups: dict[object, list[Kind]] = {}
        for param in self.params:
            if param.blocks is not None:
                groups.setdefault(param.name if param.group is None else param.group, []).append(param.kind)
        return Counter(tuple(kinds) for kinds in groups.values())

    def held(self, rank: int, optimizers: dict[str, Optimizer], *, offloaded: bool = False) -> Held:
        """What one of its ranks holds.

        Args:
            optimizers: under the keys that `Held.state` shall have.
            offloaded: parameters, gradients and state are in host memory, where nothing is rounded and every gradient
                has a tensor of its own.
        """
        here = {kind: counts(kind, kind.place(rank)) for kind in self._kinds}
        device = not offloaded
        parameters, gradients = Bytes(), Bytes()
        state = dict.fromkeys(optimizers, Bytes())
        for kind, times in self._kinds.items():
            seen, size = here[kind], kind.dtype.itemsize
            parameters += Bytes.of([(seen.numel * size, seen.padded * size)], times, on_device=device)
            if not kind.layouts:
                continue
            for key, optimizer in optimizers.items():
                tensors = optimizer.tensors(kind, seen.numel, seen.grids, seen.scales)
                state[key] += Bytes.of([(size, size) for size in tensors], times, on_device=device)
                state[key] += Bytes.of([(STEP, STEP)], times, on_device=device and optimizer.step_on_device)
        for kinds, times in self._gradient_buffers.items():
            pairs = [_gradient(kind, here[kind]) for kind in kinds]
            exact, padded = (sum(numbers) for numbers in zip(*pairs, strict=True))
            gradients += Bytes.of([(exact, exact if offloaded else padded)], times, on_device=device)
        buffers = Bytes.of([(size, size) for size in self.buffers])
        return Held(rank, parameters, gradients, buffers, state)


def _gradient(kind: Kind, seen: Counts) -> tuple[int, int]:
    """Bytes of a gradient without and with padding."""
    if kind.whole_gradient:
        return prod(kind.shape) * kind.dtype.itemsize, prod(kind.shape) * kind.dtype.itemsize
    return seen.numel * kind.dtype.itemsize, seen.padded * kind.dtype.itemsize


@dataclass(frozen=True)
class Run:
    """A whole run, as far as its memory goes: which pickles: torchtitan is imported in another process.

    Attributes:
        model: name and flavor.
        ngpu: number of ranks.
        meshes: name of a mesh -> its axes and their sizes.
        stages: the pipeline stages, in the order of their ranks.
        model_checkpoint: bytes of all tensors of the model's state dict, every one once.
        momentum: the configured `momentum_dtype`.
        fused: is `optimizer.implementation` "fused"?
        offloaded: does the run keep parameters and state in host memory (`training.enable_cpu_offload`)?
        checkpoints: does it save any?
        batch, seq_len: sequences per rank and step, and their length.
        sequence: estimated bytes that one more sequence takes at the peak of a step, or why nothing can be said.
        notes: sentences about what is not counted.
    """

    model: str
    ngpu: int
    meshes: dict[str, dict[str, int]]
    stages: tuple[Stage, ...]
    model_checkpoint: int
    momentum: torch.dtype | None
    fused: bool
    offloaded: bool
    checkpoints: bool
    batch: int
    seq_len: int
    sequence: int | str = "it was not asked for"
    notes: tuple[str, ...] = ()

    def stage_of(self, rank: int) -> Stage:
        """The pipeline stage of a rank."""
        return self.stages[rank * len(self.stages) // self.ngpu]

    @cached_property
    def params(self) -> dict[str, Param]:
        """All parameters of the model by name."""
        return {param.name: param for stage in self.stages for param in stage.params}

    @property
    def parameters(self) -> int:
        """Elements of the whole model."""
        return sum(prod(param.kind.shape) for param in self.params.values())

    def checkpoint_bytes(self, optimizer: Optimizer) -> int:
        """Of an optimizer's state in a checkpoint: every tensor once, whole."""
        kinds = Counter(param.kind for param in self.params.values())
        return sum(optimizer.whole(kind) * number for kind, number in kinds.items())


def optimizers_of(run: Run) -> tuple[dict[str, Optimizer], str]:
    """The optimizers that are compared, and the key of the configured AdamMini."""
    optimizers = {ADAMW: Optimizer("AdamW", mini=False, step_on_device=run.fused)}
    for name, dtype in TYPES.items():
        optimizers[f"adam_mini_{name}"] = Optimizer(f"AdamMini, {name} momentum", True, dtype, run.fused)
    own = {param.kind.dtype for param in run.params.values() if param.blocks}
    asked = run.momentum or (own.pop() if len(own) == 1 else None)
    for key, one in optimizers.items():
        if one.mini and one.momentum == asked:
            return optimizers, key
    key = "adam_mini_own"
    return {**optimizers, key: Optimizer("AdamMini, momentum as the parameters", True, run.momentum, run.fused)}, key

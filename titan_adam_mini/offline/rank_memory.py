"""The memory of any rank of a run, from shapes, placements and meshes alone: pure arithmetic, no process group.

torchtitan's meshes are row-major unflattenings of the ranks, so a rank's coordinate on a mesh follows from its number
and the axis's stride; for the thousand ranks of a pipeline stage, the model of a single one is enough.

Bytes are the sum of local elements x bytes per element. Memory beyond that is counted separately:

    padding    FSDP2 keeps every shard of a parameter, and of its gradient, as long as the first rank's
               (torch/distributed/fsdp/_fully_shard: `padded_sharded_param_size`; gradients of one FSDP group are views
               of one buffer, the output of their reduce-scatter)
    rounding   CUDA's caching allocator hands out multiples of 512 bytes (c10/cuda/CUDACachingAllocator: kMinBlockSize)
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
"""Every tensor on a CUDA device takes a multiple of this many bytes."""
STEP = 4
"""Bytes of `step`: one float32 per parameter, on every rank, with every optimizer."""
ADAMW = "adamw"
"""AdamW's key in `optimizers_of`."""


@dataclass(frozen=True)
class Mesh:
    """A device mesh; every rank of a pipeline stage is on one with these names, sizes and strides.

    Attributes:
        names: of its axes.
        sizes: number of ranks along each axis.
        strides: difference between the numbers of neighbouring ranks along each axis.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """A rank's coordinate on its own mesh of this kind."""
        return tuple(rank // stride % size for size, stride in zip(self.sizes, self.strides, strict=True))

    def axes(self, rank: int) -> tuple[Axis, ...]:
        """The axes of more than one rank, as `sharding.axes_of` returns them on that rank."""
        return tuple(
            Axis(index, tuple(rank + (step - place) * stride for step in range(size)))
            for index, (size, stride, place) in enumerate(
                zip(self.sizes, self.strides, self.coordinate(rank), strict=True)
            )
            if size > 1
        )


NO_MESH = Mesh((), (), ())
"""The mesh of a plain tensor."""


@dataclass(frozen=True)
class Kind:
    """How a parameter is stored; many parameters of a model share one kind.

    Attributes:
        shape: the global shape.
        dtype: of the parameter and its gradient.
        placements: DTensor placements, one per axis of `mesh`.
        mesh: the mesh it lives on.
        layouts: its block layouts; none for a frozen parameter, which has neither gradient nor state.
        fsdp: the mesh axis along which FSDP2 shards it; None if FSDP2 does not manage it.
        unsharded_gradient: whether its gradient is unsharded although the parameter is sharded: torch does that for an
            embedding whose rows are sharded by tensor parallelism without FSDP.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...] = ()
    mesh: Mesh = NO_MESH
    layouts: tuple[BlockLayout, ...] = ()
    fsdp: int | None = None
    unsharded_gradient: bool = False

    @cached_property
    def sharded_axes(self) -> frozenset[int]:
        """The mesh axes that shard it."""
        zero = (0,) * len(self.mesh.sizes)
        return frozenset(cut.axis for cut in Shard.of(self.shape, self.placements, self.mesh.sizes, zero).cuts)

    def shard_coordinate(self, rank: int) -> tuple[int, ...]:
        """The rank's coordinate on the mesh, with 0 along axes that do not shard: its shard depends on nothing else."""
        return tuple(place if axis in self.sharded_axes else 0 for axis, place in enumerate(self.mesh.coordinate(rank)))

    def shard(self, coordinate: Sequence[int]) -> Shard:
        """The shard of the rank at this coordinate of the mesh."""
        return Shard.of(self.shape, self.placements, self.mesh.sizes, coordinate)


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
        padding: bytes that FSDP2 adds to that.
        rounding: bytes that the allocator adds to both.
    """

    bytes: int = 0
    padding: int = 0
    rounding: int = 0

    @staticmethod
    def of(numbers: Iterable[tuple[int, int]], times: int = 1, *, on_device: bool = True) -> Bytes:
        """The memory of storages, each given as (bytes, bytes with padding), `times` over."""
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
        numel: of its shard.
        padded: of its shard with FSDP2's padding.
        grids: of its shard of each block grid, the second moments.
        scales: of int8 momentum.
    """

    numel: int
    padded: int
    grids: tuple[int, ...]
    scales: int


@cache
def counts(kind: Kind, coordinate: tuple[int, ...]) -> Counts:
    """The elements on the rank at `coordinate` (see `Kind.shard_coordinate`)."""
    shard = kind.shard(coordinate)
    local = box_shape(shard.box())
    grids = tuple(prod(BlockPlan.of(layout, shard).grid_shape) for layout in kind.layouts)
    return Counts(prod(local), prod(padded_shape(shard, kind.fsdp)), grids, _scales(kind.shape, local))


def padded_shape(shard: Shard, fsdp: int | None) -> tuple[int, ...]:
    """The shape in which FSDP2, whose cut on mesh axis `fsdp` is the innermost of its dim, stores a rank's shard."""
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
        title: its name in tables.
        mini: whether it is AdamMini.
        momentum: AdamMini's `momentum_dtype`; None for the parameter's own dtype.
        step_on_device: whether `step` is on the accelerator, as with fused implementations, or in host memory.
    """

    title: str
    mini: bool
    momentum: torch.dtype | None = None
    step_on_device: bool = True

    def tensors(self, kind: Kind, numel: int, grids: Iterable[int], scales: int) -> list[int]:
        """Bytes of each state tensor of one parameter with these numbers of elements, without `step`."""
        if not self.mini:
            return 2 * [numel * kind.dtype.itemsize]
        dtype = dtype_of(self.momentum, kind.dtype, kind.shape)
        second = 8 if kind.dtype == torch.float64 else 4
        state = [numel * dtype.itemsize, *(grid * second for grid in grids)]
        return [*state, scales * 4] if dtype == torch.int8 else state

    def checkpoint_bytes(self, kind: Kind) -> int:
        """Bytes of the state of one parameter in a checkpoint, which has every element once."""
        if not kind.layouts:
            return 0
        scales, grids = _scales(kind.shape, kind.shape), [layout.num_blocks for layout in kind.layouts]
        return STEP + sum(self.tensors(kind, prod(kind.shape), grids, scales))


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank: its parameters, gradients and buffers, and each optimizer's state."""

    rank: int
    parameters: Bytes
    gradients: Bytes
    buffers: Bytes
    state: dict[str, Bytes]


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: ranks with the same parameters, or shards of them. Without pipelining, all ranks of the run.

    Attributes:
        ranks: its ranks.
        parts: its model parts (several under schedules with virtual stages), each with its own optimizer.
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

    def memory_of(self, rank: int, optimizers: dict[str, Optimizer], *, offloaded: bool = False) -> RankMemory:
        """The memory of one of its ranks.

        Args:
            optimizers: key in `RankMemory.state` -> optimizer.
            offloaded: whether parameters, gradients and state are in host memory, where nothing is rounded and every
                gradient is a tensor of its own.
        """
        by_kind = {kind: counts(kind, kind.shard_coordinate(rank)) for kind in self._kinds}
        device = not offloaded
        parameters, gradients = Bytes(), Bytes()
        state = dict.fromkeys(optimizers, Bytes())
        for kind, times in self._kinds.items():
            local, size = by_kind[kind], kind.dtype.itemsize
            parameters += Bytes.of([(local.numel * size, local.padded * size)], times, on_device=device)
            if not kind.layouts:
                continue
            for key, optimizer in optimizers.items():
                tensors = optimizer.tensors(kind, local.numel, local.grids, local.scales)
                state[key] += Bytes.of([(size, size) for size in tensors], times, on_device=device)
                state[key] += Bytes.of([(STEP, STEP)], times, on_device=device and optimizer.step_on_device)
        for kinds, times in self._gradient_buffers.items():
            pairs = [_gradient(kind, by_kind[kind]) for kind in kinds]
            exact, padded = (sum(numbers) for numbers in zip(*pairs, strict=True))
            gradients += Bytes.of([(exact, exact if offloaded else padded)], times, on_device=device)
        buffers = Bytes.of([(size, size) for size in self.buffers])
        return RankMemory(rank, parameters, gradients, buffers, state)


def _gradient(kind: Kind, local: Counts) -> tuple[int, int]:
    """Bytes of a gradient without and with padding."""
    if kind.unsharded_gradient:
        return prod(kind.shape) * kind.dtype.itemsize, prod(kind.shape) * kind.dtype.itemsize
    return local.numel * kind.dtype.itemsize, local.padded * kind.dtype.itemsize


@dataclass(frozen=True)
class Run:
    """What determines the memory of a run. It pickles, because the process that imports torchtitan is another one.

    Attributes:
        model: name and flavor.
        ngpu: number of ranks.
        meshes: name of a mesh -> its axes and their sizes.
        stages: the pipeline stages, in the order of their ranks.
        model_checkpoint: bytes of all tensors of the model's state dict, each counted once.
        momentum: the configured `momentum_dtype`.
        fused: whether `optimizer.implementation` is "fused".
        offloaded: whether parameters and state are in host memory (`training.enable_cpu_offload`).
        checkpoints: whether the run saves checkpoints.
        batch, seq_len: sequences per rank and step, and their length.
        sequence: estimated bytes that one more sequence takes at the peak of a step, or why they are unknown.
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
    sequence: int | str = "it was not requested"
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
        """Elements of the full model."""
        return sum(prod(param.kind.shape) for param in self.params.values())

    def checkpoint_bytes(self, optimizer: Optimizer) -> int:
        """Bytes of an optimizer's state in a checkpoint: every tensor once, unsharded."""
        kinds = Counter(param.kind for param in self.params.values())
        return sum(optimizer.checkpoint_bytes(kind) * number for kind, number in kinds.items())


def optimizers_of(run: Run) -> tuple[dict[str, Optimizer], str]:
    """The optimizers that are compared, and the key of the configured AdamMini."""
    optimizers = {ADAMW: Optimizer("AdamW", mini=False, step_on_device=run.fused)}
    for name, dtype in TYPES.items():
        optimizers[f"adam_mini_{name}"] = Optimizer(f"AdamMini, {name} momentum", True, dtype, run.fused)
    own = {param.kind.dtype for param in run.params.values() if param.blocks}
    momentum = run.momentum or (own.pop() if len(own) == 1 else None)
    for key, optimizer in optimizers.items():
        if optimizer.mini and optimizer.momentum == momentum:
            return optimizers, key
    key = "adam_mini_own"
    return {**optimizers, key: Optimizer("AdamMini, momentum as the parameters", True, run.momentum, run.fused)}, key

"""This rank's part of a tensor, and the local tensor with its data. Independent of roles.

A `Shard` is pure data (the global shape, and the cuts made by mesh axes), so the layout of a thousand ranks
can be computed in a loop on one. It is made from DTensor placements or from slices of the flattened tensor
(FSDP1, ZeRO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

Interval = tuple[int, int]
"""Half-open range of indices along one dim."""
Box = tuple[Interval, ...]
"""One interval per dim."""


def chunk(size: int, chunks: int, index: int) -> Interval:
    """The `index`-th of `chunks` pieces of `size` indices, cut as by `torch.chunk`: the last ones may be short or
    empty."""
    length = -(-size // chunks)
    return min(index * length, size), min((index + 1) * length, size)


@dataclass(frozen=True)
class Cut:
    """Mesh axis `axis` cuts tensor dim `dim` into `size` chunks; this rank has number `coordinate`."""

    axis: int
    dim: int
    size: int
    coordinate: int


@dataclass(frozen=True)
class Shard:
    """One rank's part of a tensor.

    Attributes:
        shape: global shape.
        cuts: the cuts, along each dim in the order in which they are made (outer first).
        flat: (start, stop, axis): this rank has these elements of the flattened tensor, as one 1-D local
            tensor, and the ranks along mesh axis `axis` have the others. Excludes `cuts`.
    """

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    flat: tuple[int, int, int] | None = None

    @staticmethod
    def of(
        shape: Sequence[int], placements: Sequence[Placement], mesh_shape: Sequence[int], coordinate: Sequence[int]
    ) -> Shard:
        """The shard that DTensor `placements` give to the rank at `coordinate` of a mesh of `mesh_shape`.

        Raises ValueError for placements other than Replicate, Shard and _StridedShard.
        """
        cuts: list[Cut] = []
        for axis in reversed(range(len(placements))):
            placement = placements[axis]
            if isinstance(placement, Replicate) or mesh_shape[axis] == 1:
                continue
            dim = getattr(placement, "dim", None)
            if dim is None:
                raise ValueError(f"a parameter cannot be placed as {placement} on a mesh axis")
            # A plain Shard is cut before all axes to its right; a strided one after those whose
            # sizes multiply to its split factor (torch/distributed/tensor/placement_types.py).
            factor, position = getattr(placement, "split_factor", 1), 0
            later = [cut for cut in cuts if cut.dim == dim]
            while factor > 1 and position < len(later):
                factor, rest = divmod(factor, later[position].size)
                if rest:
                    break
                position += 1
            if factor != 1:
                raise ValueError(f"{placement} on mesh axis {axis} matches no order of the other cuts of dim {dim}")
            index = cuts.index(later[position]) if position < len(later) else len(cuts)
            cuts.insert(index, Cut(axis, dim, mesh_shape[axis], coordinate[axis]))
        return Shard(tuple(shape), tuple(cuts))

    def cuts_of(self, dim: int) -> tuple[Cut, ...]:
        """The cuts of one dim, outer first."""
        return tuple(cut for cut in self.cuts if cut.dim == dim)

    def box(self, levels: Sequence[int] | None = None) -> Box:
        """The index range per dim after all cuts, or after the first `levels[dim]` of each dim."""
        box = []
        for dim, size in enumerate(self.shape):
            start, stop = 0, size
            for cut in self.cuts_of(dim)[: None if levels is None else levels[dim]]:
                lo, hi = chunk(stop - start, cut.size, cut.coordinate)
                start, stop = start + lo, start + hi
            box.append((start, stop))
        return tuple(box)

    def pieces(self, dim: int, levels: int | None = None) -> list[Interval]:
        """The intervals of all ranks along one dim after all its cuts, or after the first `levels`."""
        pieces = [(0, self.shape[dim])]
        for cut in self.cuts_of(dim)[:levels]:
            pieces = [
                (start + lo, start + hi)
                for start, stop in pieces
                for lo, hi in (chunk(stop - start, cut.size, index) for index in range(cut.size))
            ]
        return pieces

    def boxes(self) -> tuple[Box, ...]:
        """This rank's part as disjoint boxes, in the order of the local tensor."""
        if self.flat is None:
            return (self.box(),)
        return tuple(_flat_boxes(self.shape, *self.flat[:2]))

    def views(self, local: Tensor) -> list[Tensor]:
        """Views of the local tensor, one per box of `boxes()`, each in the shape of its box."""
        if self.flat is None:
            return [local]
        sizes = [box_shape(box) for box in self.boxes()]
        pieces = local.split([prod(size) for size in sizes])
        return [piece.view(size) for piece, size in zip(pieces, sizes, strict=True)]


def box_shape(box: Box) -> tuple[int, ...]:
    """The extent of a box along each dim."""
    return tuple(stop - start for start, stop in box)


@cache
def _flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of a flattened tensor as boxes: a partial row, full rows, a partial row, dim by dim."""
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start, stop),)[: len(shape)]]
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last or len(shape) == 1:
        return [((first, first + 1), *box) for box in _flat_boxes(shape[1:], start - first * row, stop - first * row)]
    boxes: list[Box] = []
    if start % row:
        boxes += _flat_boxes(shape, start, (first + 1) * row)
        first += 1
    end_of_full_rows = stop // row
    if first < end_of_full_rows:
        boxes.append(((first, end_of_full_rows), *((0, size) for size in shape[1:])))
    if stop % row:
        boxes += _flat_boxes(shape, end_of_full_rows * row, stop)
    return boxes


@dataclass(frozen=True)
class Axis:
    """One axis, of more than one rank, of a parameter's mesh.

    Attributes:
        index: its position in that mesh.
        ranks: the global ranks along it that share this rank's other coordinates.
    """

    index: int
    ranks: tuple[int, ...]


@cache
def axes_of(mesh: DeviceMesh) -> tuple[Axis, ...]:
    """The axes of `mesh` that have more than one rank, in mesh order."""
    return tuple(
        Axis(index, tuple(torch.distributed.get_process_group_ranks(mesh.get_group(index))))
        for index in range(mesh.ndim)
        if mesh.size(index) > 1
    )


def shard_of(param: Tensor) -> Shard:
    """The shard of a parameter; a plain tensor is unsharded.

    Raises ValueError if the parameter's local tensor does not match its placements.
    """
    if not isinstance(param, DTensor):
        return Shard(tuple(param.shape))
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "the parameter is on a mesh that this rank is not part of"
    shard = Shard.of(param.shape, param.placements, mesh.shape, coordinate)
    if tuple(param.to_local().shape) != box_shape(shard.box()):
        raise ValueError(
            f"its local tensor has shape {tuple(param.to_local().shape)}, "
            f"but {param.placements} over a mesh of {tuple(mesh.shape)} give {box_shape(shard.box())}"
        )
    return shard


_FLAT = {
    "_is_flat_param": "a FlatParameter of FSDP1, which joins many parameters in one tensor",
    "_fsdp_flattened": "a flat slice that FSDP1 (FullyShardedDataParallel) made of the parameter",
    "ds_tensor": "a partition that DeepSpeed ZeRO stage 3 made of the parameter",
    "_hp_mapping": "a parameter that DeepSpeed ZeRO updates in flat partitions",
}
"""Attributes that frameworks set on tensors that are not complete parameters -> what such a tensor is."""


def refuse_flat(name: str, param: Tensor) -> None:
    """Raise ValueError, naming the framework, if a tensor is part of a flattened parameter, whose blocks are
    unknown."""
    for attribute, meaning in _FLAT.items():
        if getattr(param, attribute, False) is not False:
            cure = "use FSDP2 (fully_shard)" if "FSDP1" in meaning else "use ZeRO stage 0"
            raise ValueError(f"{name!r} is {meaning}: AdamMini cannot determine its blocks; {cure}")


_PLAIN = (Tensor, torch.nn.Parameter)


def local(tensor: Tensor) -> Tensor:
    """The plain tensor with this rank's current data: unwrapped from DTensor, async wrappers and subclasses.

    Frameworks may replace a DTensor's local tensor (FSDP2 does), so callers must not keep the result.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if type(tensor) in _PLAIN:  # the usual case; this runs for every tensor in every step
        return tensor
    wait: Any = getattr(tensor, "wait", None)
    if wait is not None:
        tensor = wait()
    # Wrappers such as torchao's float8 weights keep the data in one inner tensor; their own data_ptr is 0.
    while type(tensor) not in _PLAIN and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        if len(names) != 1:
            raise ValueError(
                f"a {type(tensor).__name__} consists of {len(names)} tensors: it cannot be updated in place"
            )
        tensor = getattr(tensor, names[0])
    return tensor


def as_state(
    data: Tensor,
    param: Tensor,
    shape: Sequence[int],
    placements: Sequence[Placement],
    stride: Sequence[int] | None = None,
) -> Tensor:
    """Wrap local `data` as a DTensor of global `shape` on the parameter's mesh; plain data for a plain parameter."""
    if not isinstance(param, DTensor):
        return data
    stride = tuple(stride or (prod(shape[dim + 1 :]) for dim in range(len(shape))))
    state = DTensor.from_local(
        data, param.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    # from_local moves data to the mesh's device type; under CPU offload it must stay on the parameter's device.
    return state if state.device == data.device else state.to(data.device)


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """This rank's part of the gradient, as a plain tensor of the local parameter's shape.

    A gradient that is Partial (sum or average) where its parameter is replicated is accepted: it is reduced later. One
    that is replicated where its parameter is sharded (torch's row-wise parallel embedding) is sliced.
    Raises ValueError if `grad` cannot update `param`: sparse, complex, or with other placements.
    """
    if grad.is_sparse or grad.layout != torch.strided:
        raise ValueError("its gradient is sparse; AdamMini needs dense gradients (sparse=False in nn.Embedding)")
    if grad.is_complex() or param.is_complex():
        raise ValueError("it is complex; AdamMini updates real parameters only (use torch.view_as_real)")
    if isinstance(param, DTensor) != isinstance(grad, DTensor):
        raise ValueError(f"the parameter is a {type(param).__name__} and its gradient a {type(grad).__name__}")
    if not isinstance(param, DTensor):
        return local(grad)
    assert isinstance(grad, DTensor)
    if param.device_mesh != grad.device_mesh:
        raise ValueError(f"the parameter is on {param.device_mesh} and its gradient on {grad.device_mesh}")
    if param.placements == grad.placements:
        return local(grad)
    for axis, (want, have) in enumerate(zip(param.placements, grad.placements, strict=True)):
        completable = isinstance(want, Replicate) and isinstance(have, Partial) and have.reduce_op in ("sum", "avg")
        if not (want == have or completable or isinstance(have, Replicate) or param.device_mesh.size(axis) == 1):
            raise ValueError(
                f"on mesh axis {axis} the parameter is {want} but its gradient {have}; redistribute the gradient first"
            )
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    replicated = [Replicate() if isinstance(placement, Partial) else placement for placement in grad.placements]
    grad_box = Shard.of(grad.shape, replicated, grad.device_mesh.shape, coordinate).box()
    own = shard_of(param).box()
    if not all(base <= lo and hi <= end for (lo, hi), (base, end) in zip(own, grad_box, strict=True) if lo < hi):
        raise ValueError(
            f"the parameter is placed as {param.placements} and its gradient, as {grad.placements}, lacks some of its "
            "elements here; redistribute the gradient first"
        )
    cut = (slice(lo - base, hi - base) for (lo, hi), (base, _) in zip(own, grad_box, strict=True))
    return local(grad)[tuple(cut)]

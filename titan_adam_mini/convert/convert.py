"""Converts AdamW's checkpoints to AdamMini's and back: a new checkpoint beside the old one, tensor by tensor.

Step, model and everything else are copied byte for byte, momentum too if its dtype stays the same. A block's second
moment is the mean of AdamW's over the block's elements; in the other direction it is spread over them, which does not
change the next update. Memory use is a few copies of one tensor, whatever the size of the checkpoint.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from ..checkpoint.check import check_parameters
from ..checkpoint.moments import block_means, spread
from ..checkpoint.stored import EXP_AVG, EXP_AVG_SCALE, EXP_AVG_SQ, GROUPS, STATE, Stored
from ..kernels import int8
from ..momentum import dtype_of
from ..partition import Blocks
from ..private import _StorageInfo
from ..state import SECOND_MOMENTS, UPSTREAM_STATE
from .atomic_folder import atomic_folder

KINDS = {"adam_mini": "AdamMini", "adamw": "AdamW"}
_OPTIMIZER = "optimizer."
_SCHEDULER = "lr_scheduler."


@dataclass
class UpdateRms:
    """Root mean square of the last update (without the learning rate), per role, before and after.

    Attributes:
        squares: role -> [elements, sum of squares before, sum of squares after].
    """

    squares: dict[str, list[float]] = field(default_factory=dict)

    def add(self, role: str, numel: int, before: float, after: float) -> None:
        """Add one parameter."""
        row = self.squares.setdefault(role, [0.0, 0.0, 0.0])
        for index, value in enumerate((numel, before, after)):
            row[index] += value

    def rows(self) -> list[tuple[str, float, float]]:
        """(role, RMS before, RMS after)."""
        return [(role, math.sqrt(old / n), math.sqrt(new / n)) for role, (n, old, new) in self.squares.items()]


@dataclass(frozen=True)
class Conversion:
    """A conversion. Its constructor checks everything that can be checked without reading tensors.

    Attributes:
        stored: the source.
        to: "adam_mini" or "adamw".
        blocks: the blocks of every parameter, by name.
        group: the keys of the target's parameter groups, with the values of a new optimizer.
        lr: a new base learning rate, or None.
        momentum_dtype: AdamMini's argument of that name.
    """

    stored: Stored
    to: str
    blocks: Mapping[str, Blocks]
    group: Mapping[str, Any]
    lr: float | None = None
    momentum_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        stored, kind = self.stored, self.stored.optimizer()
        assert self.to in KINDS
        if kind == KINDS[self.to]:
            raise ValueError(f"{stored.path} has {kind}'s optimizer state already: there is nothing to convert")
        if kind is None:
            raise ValueError(
                f"{stored.path} has no optimizer state to convert: it contains the model only (the last step is saved "
                "this way unless checkpoint.last_save_model_only = false). A model alone needs no conversion: start "
                "from it with --checkpoint.initial_load_path"
            )
        if kind == "adam-mini":
            raise ValueError(f"{stored.path} contains {UPSTREAM_STATE}")
        stored.check_files()
        check_parameters(stored, self.blocks)
        for name in stored.parameters():
            blocks = self.blocks[name]
            size, _ = self._size(name, EXP_AVG), self._size(name, EXP_AVG_SQ)
            if self.dtypes(name)[0] == torch.int8:
                self._size(name, EXP_AVG_SCALE)
            if size != blocks.shape:
                raise ValueError(f"{name} is {size} in {stored.path} and {blocks.shape} in the configuration's model")
            if self.to == "adamw":
                entries = [stored.tensors.get(f"{_OPTIMIZER}{STATE}{name}.{key}") for key in SECOND_MOMENTS]
                grids = [tuple(entry.size) for entry in entries if entry is not None]
                expected = [layout.grid_shape for layout in blocks.layouts]
                if grids != expected:
                    raise ValueError(
                        f"{name} has second moments of shape {_shapes(grids)} in {stored.path}, the configuration's "
                        f"partition {_shapes(expected)}: give head counts, roles, value_blocks and second_moment of "
                        "the run that saved it"
                    )
        if self.lr is not None and not self.lr >= 0:
            raise ValueError(f"--lr {self.lr} is not a learning rate")

    def _size(self, name: str, kind: str) -> tuple[int, ...]:
        entry = self.stored.tensors.get(_OPTIMIZER + STATE + name + kind)
        if entry is None:
            raise ValueError(f"{self.stored.path} has no {kind[1:]} of {name}: it is incomplete, use another step")
        return tuple(entry.size)

    def param_dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter; if the checkpoint lacks the model, that of its momentum, or float32."""
        entry = self.stored.tensors.get(name) or self.stored.tensors[_OPTIMIZER + STATE + name + EXP_AVG]
        dtype: torch.dtype = entry.properties.dtype
        return torch.float32 if dtype == torch.int8 else dtype

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter's second moment in the target."""
        param = self.param_dtype(name)
        if self.to == "adamw":
            return param
        return torch.float64 if param == torch.float64 else torch.float32

    def dtypes(self, name: str) -> tuple[torch.dtype, torch.dtype]:
        """The dtype of a parameter's momentum in the source, and in the target."""
        source: torch.dtype = self.stored.tensors[_OPTIMIZER + STATE + name + EXP_AVG].properties.dtype
        param = self.param_dtype(name)
        return source, param if self.to == "adamw" else dtype_of(self.momentum_dtype, param, self.blocks[name].shape)

    def converts(self, key: str) -> bool:
        """Whether this entry is momentum, or its scales, with another dtype in the target."""
        if not key.startswith(_OPTIMIZER + STATE) or not key.endswith((EXP_AVG, EXP_AVG_SCALE)):
            return False
        source, target = self.dtypes(key.removeprefix(_OPTIMIZER + STATE).rpartition(".")[0])
        return source != target

    def momentum(self, name: str, chunk: ChunkStorageMetadata | None = None) -> Tensor:
        """The momentum of a parameter, or of a box of complete runs, dequantized."""
        stored, key = self.stored, _OPTIMIZER + STATE + name
        values = stored.read(key + EXP_AVG, chunk)
        if values.dtype != torch.int8:
            return values
        return int8.dequantized(values, stored.read(key + EXP_AVG_SCALE, None if chunk is None else _runs(chunk)))

    def chunks(self, name: str) -> list[ChunkStorageMetadata]:
        """The chunks of a parameter's momentum in the target: as in the source, but int8 is never cut inside a run."""
        momentum = self.stored.tensors[_OPTIMIZER + STATE + name + EXP_AVG]
        aligned = all((chunk.offsets[-1] | chunk.sizes[-1]) % int8.RUN == 0 for chunk in momentum.chunks if chunk.sizes)
        if self.dtypes(name)[1] != torch.int8 or aligned:
            return list(momentum.chunks)
        return [ChunkStorageMetadata(torch.Size([0] * len(momentum.size)), momentum.size)]

    def growth(self) -> int:
        """Additional bytes of the momentum in the target."""
        sizes = {name: self._size(name, EXP_AVG) for name in self.blocks}
        dtypes = {name: self.dtypes(name) for name in self.blocks}
        return sum(math.prod(sizes[name]) * max(0, new.itemsize - old.itemsize) for name, (old, new) in dtypes.items())

    def objects(self) -> dict[str, Any]:
        """New values of entries, by name: missing group keys, and the learning rates if `lr` is given."""
        stored = self.stored
        new: dict[str, Any] = {}
        for name in stored.parameters():
            prefix = f"{_OPTIMIZER}{GROUPS}{name}."
            keys = {key.removeprefix(prefix) for key in stored.metadata.state_dict_metadata if key.startswith(prefix)}
            new |= {prefix + key: value for key, value in self.group.items() if key not in keys}
            if self.lr is not None and "lr" in keys:
                old = float(stored.value(prefix + "lr"))
                base = float(stored.value(prefix + "initial_lr")) if "initial_lr" in keys else old
                # The position in the schedule is kept: the group's lr is the base times the schedule's factor.
                new[prefix + "lr"] = self.lr * (old / base if base else 1.0)
                if "initial_lr" in keys:
                    new[prefix + "initial_lr"] = self.lr
        bases = _SCHEDULER + "base_lrs"
        if self.lr is not None and bases in stored:
            old_bases = stored.value(bases)
            new[bases] = [self.lr] * len(old_bases)
            if (last := _SCHEDULER + "_last_lr") in stored:
                rates = zip(stored.value(last), old_bases, strict=True)
                new[last] = [self.lr * (float(rate) / float(base) if base else 1.0) for rate, base in rates]
        return new

    def dropped(self, name: str) -> bool:
        """Whether this entry is a key of the source's groups that the target's do not have."""
        if not name.startswith(_OPTIMIZER + GROUPS):
            return False
        key = name.rpartition(".")[2]
        return key not in self.group and key != "initial_lr"

    def second_moments(self, name: str) -> list[Tensor]:
        """A parameter's second moments in the source: its grids, or, if they are AdamW's, one tensor of its shape."""
        keys = [f"{_OPTIMIZER}{STATE}{name}.{key}" for key in SECOND_MOMENTS]
        return [self.stored.read(key) for key in keys if key in self.stored.tensors]

    def compare(self, name: str, roots: Tensor | None, grids: list[Tensor], update_rms: UpdateRms) -> None:
        """Add a parameter's last update to `update_rms`: before, with AdamW's second moments, given as square `roots`
        (None: with those of the blocks), and after, with those of the blocks."""
        stored, prefix = self.stored, f"{_OPTIMIZER}{GROUPS}{name}."
        betas, eps = stored.value(prefix + "betas"), float(stored.value(prefix + "eps"))
        step = float(stored.value(f"{_OPTIMIZER}{STATE}{name}.step"))
        if step < 1:
            return
        first, second = 1 - betas[0] ** step, 1 - betas[1] ** step
        momentum = self.momentum(name)
        layouts, before, after = self.blocks[name].layouts, 0.0, 0.0
        rows = max(1, (1 << 20) // max(1, math.prod(momentum.shape[1:])))
        for lo in range(0, max(1, momentum.shape[0] if momentum.ndim else 1), rows):
            window = slice(lo, lo + rows) if momentum.ndim else ()
            update = momentum[window].double() / first
            box = [(0, size) for size in momentum.shape]
            if box:
                box[0] = (lo, min(lo + rows, momentum.shape[0]))
            of_blocks = spread(grids, layouts, box).double().sqrt()
            of_elements = of_blocks if roots is None else roots[window].double()
            before += float((update / (of_elements / second**0.5 + eps)).square().sum())
            after += float((update / (of_blocks / second**0.5 + eps)).square().sum())
        update_rms.add(self.blocks[name].role, momentum.numel(), before, after)


def _runs(chunk: ChunkStorageMetadata) -> ChunkStorageMetadata:
    """The scales of a box of int8 values."""
    offsets = torch.Size([*chunk.offsets[:-1], chunk.offsets[-1] // int8.RUN])
    return ChunkStorageMetadata(offsets, torch.Size(int8.scale_shape(chunk.sizes)))


def _is_second_moment(name: str) -> bool:
    return name.startswith(_OPTIMIZER + STATE) and name.rpartition(".")[2] in SECOND_MOMENTS


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes))


def convert(
    conversion: Conversion, target: Path, on_bytes: Callable[[int], None] = lambda count: None
) -> list[tuple[str, float, float]]:
    """Write the converted checkpoint to the folder `target`, completely or not at all.

    Args:
        conversion: the conversion.
        target: a folder that does not exist yet.
        on_bytes: called repeatedly with the number of source bytes that were processed.

    Returns:
        (role, RMS of the last update before, after) for every role; equal numbers where nothing is averaged.

    Raises:
        ValueError: `target` exists, another conversion is writing it, or its disk is full; nothing is left behind.
    """
    bound = conversion.stored.size * (1 if conversion.to == "adam_mini" else 2) + conversion.growth()
    with atomic_folder(target, bound) as folder:
        writer = _Writer(folder, conversion)
        for number, file in enumerate(conversion.stored.files):
            writer.write(file, number, on_bytes)
        writer.finish()
    return writer.update_rms.rows()


class _Writer:
    """Writes the files of the target, one for each file of the source, and finally the metadata."""

    def __init__(self, folder: Path, conversion: Conversion) -> None:
        self.folder, self.conversion = folder, conversion
        self.update_rms = UpdateRms()
        self.objects = conversion.objects()
        self.entries: dict[str, Any] = {}
        self.results: list[WriteResult] = []
        self.seen: set[str] = set()

    def write(self, file: str, number: int, on_bytes: Callable[[int], None]) -> None:
        """Convert one file of the source; the first one also gets all new objects."""
        stored = self.conversion.stored
        with open(self.folder / f"__{number}_0.distcp", "wb") as stream:
            for index, where in stored.parts(file):
                key = index.fqn
                if not (_is_second_moment(key) or key in self.objects or self.conversion.dropped(key)):
                    if not self.conversion.converts(key):
                        self.entries[key] = stored.metadata.state_dict_metadata[key]
                        start = stream.tell()
                        stream.writelines(stored.raw(where))
                        self._note(stream, replace(index, index=None), start, where.transform_descriptors)
                    for new, tensor in (*self._momentum(index), *self._second_moments(index)):
                        self._save(stream, new, tensor)
                on_bytes(where.length)
            for key, value in self.objects.items() if number == 0 else ():
                entry = stored.metadata.state_dict_metadata.get(key, BytesStorageMetadata())
                offset = None
                if isinstance(entry, TensorStorageMetadata):  # a learning rate may be a tensor
                    value, offset = torch.full(entry.size, value, dtype=entry.properties.dtype), [0] * len(entry.size)
                self._save(stream, MetadataIndex(key, offset), value)
                self.entries[key] = entry
            stream.flush()
            os.fsync(stream.fileno())

    def _save(self, stream: BufferedWriter, index: MetadataIndex, value: Any) -> None:
        start = stream.tell()
        torch.save(value, stream)
        self._note(stream, index, start)

    def _note(self, stream: BufferedWriter, index: MetadataIndex, start: int, transforms: Any = None) -> None:
        length = stream.tell() - start
        info = _StorageInfo(Path(stream.name).name, start, length, transform_descriptors=transforms)
        self.results.append(WriteResult(index, length, info))

    def _momentum(self, index: MetadataIndex) -> Iterator[tuple[MetadataIndex, Tensor]]:
        """A chunk of a momentum whose dtype changes, with its scales if the target has any."""
        conversion, key = self.conversion, index.fqn
        if not (conversion.converts(key) and key.endswith(EXP_AVG)):
            return
        name = key.removeprefix(_OPTIMIZER + STATE).removesuffix(EXP_AVG)
        dtype, entry, chunks = conversion.dtypes(name)[1], conversion.stored.tensors[key], conversion.chunks(name)
        if key in self.entries and len(chunks) < len(entry.chunks):
            return  # it was written as a single chunk
        offsets = index.offset if index.offset is not None else torch.Size([0] * len(entry.size))
        chunk = (
            chunks[0]
            if len(chunks) < len(entry.chunks)
            else next(chunk for chunk in chunks if chunk.offsets == offsets)
        )
        self.entries[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), entry.size, chunks)
        wide = conversion.momentum(name, chunk)
        if dtype != torch.int8:
            yield MetadataIndex(key, chunk.offsets), wide.to(dtype)
            return
        values = torch.empty(chunk.sizes, dtype=torch.int8)
        scale = torch.empty(int8.scale_shape(chunk.sizes))
        int8.quantize(wide.float(), values, scale)
        size, runs = torch.Size(int8.scale_shape(entry.size)), [_runs(chunk) for chunk in chunks]
        key_of_scale = key.removesuffix(EXP_AVG) + EXP_AVG_SCALE
        self.entries[key_of_scale] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, runs)
        yield MetadataIndex(key, chunk.offsets), values
        yield MetadataIndex(key_of_scale, _runs(chunk).offsets), scale

    def _second_moments(self, index: MetadataIndex) -> Iterator[tuple[MetadataIndex, Tensor]]:
        """The second moments written with a chunk of a momentum: those of the chunk, or, once, those of all blocks."""
        prefix = _OPTIMIZER + STATE
        if not (index.fqn.startswith(prefix) and index.fqn.endswith(EXP_AVG)):
            return
        conversion = self.conversion
        name = index.fqn.removeprefix(prefix).removesuffix(EXP_AVG)
        blocks, dtype, first = conversion.blocks[name], conversion.dtype(name), name not in self.seen
        self.seen.add(name)
        properties = TensorProperties(dtype=dtype)
        momentum, grids = conversion.stored.tensors[index.fqn], conversion.second_moments(name)
        if conversion.to == "adam_mini":
            if not first:
                return
            roots, means = block_means(grids[0], blocks.layouts)
            grids = [mean.to(dtype) for mean in means]
            conversion.compare(name, roots, grids, self.update_rms)
            for key, grid in zip(SECOND_MOMENTS, grids, strict=False):
                fqn, offsets, size = f"{prefix}{name}.{key}", torch.Size([0] * grid.ndim), grid.size()
                self.entries[fqn] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(offsets, size)])
                yield MetadataIndex(fqn, offsets), grid.clone()
            return
        key = prefix + name + EXP_AVG_SQ
        if first:
            conversion.compare(name, None, grids, self.update_rms)
            self.entries[key] = TensorStorageMetadata(properties, momentum.size, momentum.chunks)
        offsets = index.offset if index.offset is not None else torch.Size([0] * len(momentum.size))
        chunk = next(chunk for chunk in momentum.chunks if chunk.offsets == offsets)
        box = [(lo, lo + size) for lo, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        yield MetadataIndex(key, offsets), spread(grids, blocks.layouts, box).to(dtype).contiguous().clone()

    def finish(self) -> None:
        """Write the metadata with torch's own writer."""
        paths = dict(self.conversion.stored.metadata.planner_data or {})
        for name in self.entries:
            if name not in paths and name.startswith(_OPTIMIZER):
                paths[name] = ("optimizer", name.removeprefix(_OPTIMIZER))
        planner_data = {name: path for name, path in paths.items() if name in self.entries}
        FileSystemWriter(self.folder).finish(Metadata(self.entries, planner_data=planner_data), [self.results])

"""AdamW's checkpoint becomes AdamMini's and back: a new checkpoint beside the old one, tensor by tensor.

Momentum, step, model and everything else are copied byte for byte. The second moment of a block is the mean of AdamW's
over the block's elements; the other way it is spread over them, which leaves the next update as it is. Memory holds a
few copies of one tensor, whatever the size of the checkpoint.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from ..kernels import vectorized
from ..kernels.tensorwise import Tensorwise
from ..layout import BlockLayout, Tiles
from ..partition import Blocks
from ..plan import BlockPlan
from ..sharding import Shard
from ..state import AUTHORS
from .check import some
from .stored import EXP_AVG, EXP_AVG_SQ, GROUPS, STATE, Stored

KINDS = {"adam_mini": "AdamMini", "adamw": "AdamW"}
_OPTIMIZER = "optimizer."
_SCHEDULER = "lr_scheduler."


@dataclass
class Roles:
    """Root mean square of the next update (without the learning rate), per role, before and after.

    Attributes:
        squares: role -> [elements, sum of squares before, sum of squares after].
    """

    squares: dict[str, list[float]] = field(default_factory=dict)

    def add(self, role: str, numel: int, before: float, after: float) -> None:
        """Count one parameter in."""
        row = self.squares.setdefault(role, [0.0, 0.0, 0.0])
        for place, value in enumerate((numel, before, after)):
            row[place] += value

    def rows(self) -> list[tuple[str, float, float]]:
        """(role, RMS before, RMS after)."""
        return [(role, math.sqrt(old / n), math.sqrt(new / n)) for role, (n, old, new) in self.squares.items()]


@dataclass(frozen=True)
class Conversion:
    """What is to become what. Making one checks everything that can be checked without reading tensors.

    Attributes:
        stored: the source.
        to: "adam_mini" or "adamw".
        blocks: the blocks of every parameter, by name.
        group: the keys of the target's parameter groups, with the values of a new optimizer.
        lr: a new base learning rate, or None.
    """

    stored: Stored
    to: str
    blocks: Mapping[str, Blocks]
    group: Mapping[str, Any]
    lr: float | None = None

    def __post_init__(self) -> None:
        stored, kind = self.stored, self.stored.optimizer()
        assert self.to in KINDS
        if kind == KINDS[self.to]:
            raise ValueError(f"{stored.path} holds {kind}'s optimizer state already: there is nothing to convert")
        if kind is None:
            raise ValueError(
                f"{stored.path} has no optimizer state to convert: it holds a model only (the last step is saved so "
                "unless checkpoint.last_save_model_only = false). A model alone needs no conversion: start from it "
                "with --checkpoint.initial_load_path"
            )
        if kind == "adam-mini":
            raise ValueError(f"{stored.path} holds {AUTHORS}")
        stored.check_files()
        names = stored.parameters()
        for told, odd in (
            ("has state for {} that the model of the configuration does not have", set(names) - set(self.blocks)),
            ("has no state for {} of the configuration's model", set(self.blocks) - set(names)),
        ):
            if odd:
                shown = some(sorted(odd))
                raise ValueError(f"{stored.path} {told.format(shown)}: is it the configuration of this run?")
        for name in names:
            blocks = self.blocks[name]
            size, grid = self._size(name, EXP_AVG), self._size(name, EXP_AVG_SQ)
            if size != blocks.shape:
                raise ValueError(f"{name} is {size} in {stored.path} and {blocks.shape} in the configuration's model")
            if self.to == "adamw" and grid != blocks.layout.grid_shape:
                raise ValueError(
                    f"{name} has second moments of shape {grid} in {stored.path}, the configuration's partition "
                    f"{blocks.layout.grid_shape}: give head counts, roles and value_blocks of the run that saved it"
                )
        if self.lr is not None and not self.lr >= 0:
            raise ValueError(f"--lr {self.lr} is not a learning rate")

    def _size(self, name: str, kind: str) -> tuple[int, ...]:
        entry = self.stored.tensors.get(_OPTIMIZER + STATE + name + kind)
        if entry is None:
            raise ValueError(f"{self.stored.path} has no {kind[1:]} of {name}: it is not whole, take another step")
        return tuple(entry.size)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the second moment that the target keeps for a parameter."""
        entry = self.stored.tensors.get(name) or self.stored.tensors[_OPTIMIZER + STATE + name + EXP_AVG]
        param: torch.dtype = entry.properties.dtype
        if self.to == "adamw":
            return param
        return torch.float64 if param == torch.float64 else torch.float32

    def objects(self) -> dict[str, Any]:
        """The entries to be written anew, by name: group keys, and the learning rates of `lr`."""
        stored = self.stored
        new: dict[str, Any] = {}
        for name in stored.parameters():
            start = f"{_OPTIMIZER}{GROUPS}{name}."
            had = {key.removeprefix(start) for key in stored.metadata.state_dict_metadata if key.startswith(start)}
            new |= {start + key: value for key, value in self.group.items() if key not in had}
            if self.lr is not None and "lr" in had:
                old = float(stored.value(start + "lr"))
                base = float(stored.value(start + "initial_lr")) if "initial_lr" in had else old
                # Where the schedule stands is kept: the group's lr is the base times the schedule's factor.
                new[start + "lr"] = self.lr * (old / base if base else 1.0)
                if "initial_lr" in had:
                    new[start + "initial_lr"] = self.lr
        bases = _SCHEDULER + "base_lrs"
        if self.lr is not None and bases in stored:
            old_bases = stored.value(bases)
            new[bases] = [self.lr] * len(old_bases)
            if (last := _SCHEDULER + "_last_lr") in stored:
                rates = zip(stored.value(last), old_bases, strict=True)
                new[last] = [self.lr * (float(rate) / float(base) if base else 1.0) for rate, base in rates]
        return new

    def dropped(self, name: str) -> bool:
        """Is this entry a key of the source's groups that the target's do not have?"""
        if not name.startswith(_OPTIMIZER + GROUPS):
            return False
        key = name.rpartition(".")[2]
        return key not in self.group and key != "initial_lr"

    def block_means(self, name: str) -> tuple[Tensor, Tensor]:
        """AdamW's second moments of a parameter as roots, and their means per block in the target's dtype.

        They are read as roots because the engine, whose order of summation this is, squares.
        """
        roots = self.stored.read(_OPTIMIZER + STATE + name + EXP_AVG_SQ)
        dtype = torch.float64 if roots.dtype == torch.float64 else torch.float32
        roots = roots.to(dtype).sqrt_()
        plan = BlockPlan.of(self.blocks[name].layout, Shard(tuple(roots.shape)))
        plain, sums = Tensorwise("foreach", vectorized), roots.new_zeros(plan.sums_shape)
        plain.add_sums(plan, roots, sums)
        means = plain.means(plan, sums)
        return roots, means.to(self.dtype(name))

    def compare(self, name: str, roots: Tensor | None, grid: Tensor, roles: Roles) -> None:
        """Add a parameter's next update to `roles`: before, with AdamW's second moments if there are `roots` of them,
        and with those of the blocks."""
        stored, start = self.stored, f"{_OPTIMIZER}{GROUPS}{name}."
        betas, eps = stored.value(start + "betas"), float(stored.value(start + "eps"))
        step = float(stored.value(f"{_OPTIMIZER}{STATE}{name}.step"))
        if step < 1:
            return
        first, second = 1 - betas[0] ** step, 1 - betas[1] ** step
        momentum = stored.read(_OPTIMIZER + STATE + name + EXP_AVG)
        layout, before, after = self.blocks[name].layout, 0.0, 0.0
        rows = max(1, (1 << 20) // max(1, math.prod(momentum.shape[1:])))
        for lo in range(0, max(1, momentum.shape[0] if momentum.ndim else 1), rows):
            here = slice(lo, lo + rows) if momentum.ndim else ()
            update = momentum[here].double() / first
            box = [(0, size) for size in momentum.shape]
            if box:
                box[0] = (lo, min(lo + rows, momentum.shape[0]))
            shared = spread(grid, layout, box).double().sqrt()
            own = shared if roots is None else roots[here].double()
            before += float((update / (own / second**0.5 + eps)).square().sum())
            after += float((update / (shared / second**0.5 + eps)).square().sum())
        roles.add(self.blocks[name].role, momentum.numel(), before, after)


def _is_second_moment(name: str) -> bool:
    return name.startswith(_OPTIMIZER + STATE) and name.endswith(EXP_AVG_SQ)


def spread(grid: Tensor, layout: BlockLayout, box: list[tuple[int, int]]) -> Tensor:
    """The elements of `box`, each with the value of its block."""
    for dim, (tiles, (start, stop)) in enumerate(zip(layout.dims, box, strict=True)):
        grid = grid.index_select(dim, _tiles_of(tiles, start, stop)) if not tiles.is_whole else grid
    return grid.expand([stop - start for start, stop in box])


def _tiles_of(tiles: Tiles, start: int, stop: int) -> Tensor:
    """The number of the tile of every index in [start, stop)."""
    first, last = tiles.span(start, stop)
    lengths = torch.tensor(tiles.clip(start, stop).lengths(), dtype=torch.int64)
    return torch.arange(first, last).repeat_interleave(lengths)


def convert(
    conversion: Conversion, target: Path, on_bytes: Callable[[int], None] = lambda count: None
) -> list[tuple[str, float, float]]:
    """Write the converted checkpoint as the folder `target`, which appears whole or not at all.

    Args:
        conversion: what becomes what.
        target: a folder that does not exist yet.
        on_bytes: called with the number of source bytes done, bit by bit.

    Returns:
        (role, RMS of the next update before, after) for every role; equal numbers where nothing is averaged.

    Raises:
        ValueError: `target` exists, another conversion writes it, or its disk is full; nothing is left behind.
    """
    bound = conversion.stored.size * (1 if conversion.to == "adam_mini" else 2)
    with _appearing(target, bound) as folder:
        writer = _Writer(folder, conversion)
        for number, file in enumerate(conversion.stored.files):
            writer.write(file, number, on_bytes)
        writer.finish()
    return writer.roles.rows()


class _Writer:
    """Writes the files of the target, one for each of the source, and the metadata at last."""

    def __init__(self, folder: Path, conversion: Conversion) -> None:
        self.folder, self.conversion = folder, conversion
        self.roles = Roles()
        self.objects = conversion.objects()
        self.entries: dict[str, Any] = {}
        self.results: list[WriteResult] = []
        self.seen: set[str] = set()

    def write(self, file: str, number: int, on_bytes: Callable[[int], None]) -> None:
        """One file of the source, and with the first one all new objects."""
        stored = self.conversion.stored
        with open(self.folder / f"__{number}_0.distcp", "wb") as stream:
            for index, where in stored.parts(file):
                key = index.fqn
                if not (_is_second_moment(key) or key in self.objects or self.conversion.dropped(key)):
                    self.entries[key] = stored.metadata.state_dict_metadata[key]
                    start = stream.tell()
                    stream.writelines(stored.raw(where))
                    self._note(stream, replace(index, index=None), start, where.transform_descriptors)
                    for new, tensor in self._second_moments(index):
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

    def _second_moments(self, index: MetadataIndex) -> Iterator[tuple[MetadataIndex, Tensor]]:
        """What goes beside a part of a momentum: the second moments there, or, once, those of all blocks."""
        start = _OPTIMIZER + STATE
        if not (index.fqn.startswith(start) and index.fqn.endswith(EXP_AVG)):
            return
        conversion = self.conversion
        name = index.fqn.removeprefix(start).removesuffix(EXP_AVG)
        key, blocks, dtype = start + name + EXP_AVG_SQ, conversion.blocks[name], conversion.dtype(name)
        properties = TensorProperties(dtype=dtype)
        momentum = conversion.stored.tensors[index.fqn]
        if conversion.to == "adam_mini":
            if name in self.seen:
                return
            roots, grid = conversion.block_means(name)
            conversion.compare(name, roots, grid, self.roles)
            offsets, size = torch.Size([0] * grid.ndim), grid.size()
            self.entries[key] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(offsets, size)])
            part = grid.clone()
        else:
            grid = conversion.stored.read(key)
            if name not in self.seen:
                conversion.compare(name, None, grid, self.roles)
                self.entries[key] = TensorStorageMetadata(properties, momentum.size, momentum.chunks)
            offsets = index.offset if index.offset is not None else torch.Size([0] * len(momentum.size))
            chunk = next(chunk for chunk in momentum.chunks if chunk.offsets == offsets)
            box = [(lo, lo + size) for lo, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            part = spread(grid, blocks.layout, box).to(dtype).contiguous().clone()
        self.seen.add(name)
        yield MetadataIndex(key, offsets), part

    def finish(self) -> None:
        """Write the metadata, by torch's own writer."""
        paths = dict(self.conversion.stored.metadata.planner_data or {})
        for name in self.entries:
            if name not in paths and name.startswith(_OPTIMIZER):
                paths[name] = ("optimizer", name.removeprefix(_OPTIMIZER))
        planner_data = {name: path for name, path in paths.items() if name in self.entries}
        FileSystemWriter(self.folder).finish(Metadata(self.entries, planner_data=planner_data), [self.results])


@contextmanager
def _appearing(target: Path, size: int) -> Iterator[Path]:
    """A folder to write in, which is called `target` once the block ends well and is gone if it does not.

    What a killed conversion has left there is removed by the next one of the same target.
    """
    if target.exists():
        raise ValueError(f"{target} exists; nothing is overwritten: remove it, or name another folder")
    existing = next(parent for parent in target.absolute().parents if parent.is_dir())
    if (free := shutil.disk_usage(existing).free) < size:
        raise ValueError(f"{existing} has {free:,} bytes free, and the conversion may need {size:,}")
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    # torchtitan takes whatever holds "step-N" for a checkpoint, so this name must not.
    folder = target.absolute().parent / f".converting-{target.name.replace('step-', '')}"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    done = False
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            made = []
            raise ValueError(f"another conversion is writing {target}: wait for it, or name another folder") from None
        try:
            for old in folder.iterdir():
                old.unlink()
            with _ending_in_order():
                yield folder
                folder.rename(target)
                done = True
        finally:
            if not done:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
        if not done:
            for parent in made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that its cleaning up happens."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

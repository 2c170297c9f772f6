"""A distributed checkpoint (torch.distributed.checkpoint) on disk: its contents, and access to single entries.

Nothing here needs a process group, data are read only on demand, and nothing in a checkpoint is executed: torch's own
reader would run code named in its pickles.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..pickles import NotAllowed
from ..private import _create_file_view
from ..sharding import Box
from ..state import UPSTREAM_KEYS
from .metadata import read_metadata

STATE, EXP_AVG, EXP_AVG_SCALE, EXP_AVG_SQ = "state.", ".exp_avg", ".exp_avg_scale", ".exp_avg_sq"
GROUPS = "param_groups."

_ANOTHER = "use another step (--checkpoint.load_step in torchtitan)"


@dataclass(frozen=True)
class Kind:
    """How the moments of one parameter are stored in a checkpoint.

    Attributes:
        momentum: dtype of the first moment.
        second: dtype of the second moments.
        elementwise: whether there is one second moment per element, as in AdamW.
    """

    momentum: torch.dtype
    second: torch.dtype
    elementwise: bool


class Stored:
    """A complete checkpoint in the folder `path`.

    Attributes:
        path: the folder.
        metadata: torch's own description of it.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the metadata. Raises ValueError if the folder is not a complete checkpoint."""
        self.path = Path(path)
        self._reader = FileSystemReader(self.path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder: a checkpoint is a folder such as checkpoint/step-1000")
        if not (self.path / ".metadata").is_file():
            raise ValueError(
                f"{self.path} is not a complete checkpoint: it has no .metadata, which is written last; either the "
                "save was interrupted, or it is not a torch distributed checkpoint"
            )
        try:
            self.metadata = read_metadata((self.path / ".metadata").read_bytes())
        except NotAllowed as error:
            raise ValueError(
                f"{self.path}/.metadata was not written by torch's distributed checkpoint: it refers to {error}, which "
                "could run arbitrary code (nothing was run)"
            ) from None
        except pickle.UnpicklingError as error:
            raise ValueError(f"{self.path}/.metadata cannot be read ({error}): {_ANOTHER}") from None
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Size, dtype and chunks of every tensor, by name."""
        entries = self.metadata.state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def __contains__(self, name: str) -> bool:
        return name in self.metadata.state_dict_metadata

    def parts(self, file: str) -> list[tuple[MetadataIndex, Any]]:
        """The contents of one file in their order there: (index, where)."""
        return self._by_file[file]

    @property
    def files(self) -> list[str]:
        """Names of the files with data."""
        return sorted(self._by_file)

    @cached_property
    def _by_file(self) -> dict[str, list[tuple[MetadataIndex, Any]]]:
        found: dict[str, list[tuple[MetadataIndex, Any]]] = {}
        for index, where in self.metadata.storage_data.items():
            found.setdefault(where.relative_path, []).append((index, where))
        return {file: sorted(parts, key=lambda part: part[1].offset) for file, parts in found.items()}

    @property
    def size(self) -> int:
        """Size of all data, in bytes."""
        return sum(where.length for where in self.metadata.storage_data.values())

    def check_files(self) -> None:
        """Raise ValueError, naming the file, if a file with data is missing or shorter than it should be."""
        for file in self.files:
            want = max(where.offset + where.length for _, where in self.parts(file))
            path = self.path / file
            if not path.is_file():
                raise ValueError(f"{path} is missing: the checkpoint is damaged, {_ANOTHER}")
            if (have := path.stat().st_size) < want:
                raise ValueError(f"{path} has {have:,} of {want:,} bytes: the checkpoint is damaged, {_ANOTHER}")

    def optimizer(self, prefix: str = "optimizer.") -> str | None:
        """The optimizer whose state is under `prefix`: "AdamMini", "AdamW", "adam-mini" (the authors'), or None."""
        start = prefix + STATE
        names = [name for name in self.metadata.state_dict_metadata if name.startswith(start)]
        if any(name.rpartition(".")[2] in UPSTREAM_KEYS for name in names):
            return "adam-mini"
        seconds = [name for name in names if name.endswith(EXP_AVG_SQ) and name in self.tensors]
        if not seconds:
            return None
        firsts = [name.removesuffix(EXP_AVG_SQ) + EXP_AVG for name in seconds]
        alike = all(
            first in self.tensors and self.tensors[first].size == self.tensors[second].size
            for first, second in zip(firsts, seconds, strict=True)
        )
        return "AdamW" if alike else "AdamMini"

    def parameters(self, prefix: str = "optimizer.") -> list[str]:
        """Names of the parameters that have optimizer state under `prefix`."""
        start = prefix + STATE
        return [
            name.removeprefix(start).removesuffix(EXP_AVG)
            for name in self.tensors
            if name.startswith(start) and name.endswith(EXP_AVG)
        ]

    def kinds(self, prefix: str = "optimizer.") -> dict[str, Kind]:
        """The kind of the moments of every parameter that has both under `prefix`, by name."""
        elementwise, kinds = self.optimizer(prefix) == "AdamW", {}
        for name in self.parameters(prefix):
            start = prefix + STATE + name
            first, second = self.tensors[start + EXP_AVG], self.tensors.get(start + EXP_AVG_SQ)
            if second is not None:
                kinds[name] = Kind(first.properties.dtype, second.properties.dtype, elementwise)
        return kinds

    def value(self, name: str) -> Any:
        """One entry: a full CPU tensor, or the object that was saved.

        Raises ValueError for types other than those that torch considers safe (numbers, text, bytes, containers and
        tensors, which is all that torchtitan saves).
        """
        if name in self.tensors:
            return self.read(name)
        into = _Into(None)
        item = ReadItem(
            type=LoadItemType.BYTE_IO,
            dest_index=MetadataIndex(name),
            dest_offsets=torch.Size((0,)),
            storage_index=MetadataIndex(name),
            storage_offsets=torch.Size((0,)),
            lengths=torch.Size((0,)),
        )
        self._reader.read_data(LoadPlan([item]), into).wait()
        assert into.data is not None
        try:
            return torch.load(into.data, weights_only=True)
        except Exception as error:  # a broken file raises nearly anything
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            what = (
                f"refers to {foreign[1]}, which could run arbitrary code"
                if foreign
                else "is damaged or of another kind"
            )
            raise ValueError(f"{self.path}: its entry {name!r} {what} (nothing was run)") from None

    def read(self, name: str, chunk: ChunkStorageMetadata | None = None) -> Tensor:
        """A tensor, or the box `chunk` of it (offsets and sizes), as a new CPU tensor of its dtype."""
        entry = self.tensors[name]
        box = chunk or ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size)
        target = torch.empty(box.sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(name, entry, [box])
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target

    def window(self, name: str, box: Box) -> Tensor:
        """A box of a tensor as from `read`, in less memory: `read` loads entire stored parts.

        Here only the bytes from the first to the last element of the box are read from a part; for a box of full rows
        these are exactly its bytes.
        """
        start, sizes = (torch.Size(values) for values in ([lo for lo, _ in box], [hi - lo for lo, hi in box]))
        target = torch.empty(sizes, dtype=self.tensors[name].properties.dtype)
        for item in create_read_items_for_chunk_list(name, self.tensors[name], [ChunkStorageMetadata(start, sizes)]):
            _narrow(target, item.dest_offsets, item.lengths).copy_(self._piece(item))
        return target

    def _piece(self, item: ReadItem) -> Tensor:
        """The data of an item, read from one stored part."""
        where = self.metadata.storage_data[item.storage_index]
        with open(self.path / where.relative_path, "rb") as file:
            # On the meta device torch.load reads no values, but records their offset in the file.
            tensor = torch.load(_create_file_view(file, where.offset, where.length), "meta", weights_only=True)
            part = _narrow(tensor, item.storage_offsets, item.lengths)
            span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
            data = bytearray(span * part.itemsize)
            begin = where.offset + tensor.untyped_storage()._checkpoint_offset
            file.seek(begin + part.storage_offset() * part.itemsize)
            if file.readinto(data) < len(data):
                raise ValueError(f"{file.name} ends too early: the checkpoint is damaged, {_ANOTHER}")
        return torch.frombuffer(data, dtype=part.dtype).as_strided(part.shape, part.stride())

    def raw(self, where: Any, size: int = 1 << 22) -> Iterator[bytes]:
        """The raw bytes of one stored part, in pieces of at most `size`."""
        with open(self.path / where.relative_path, "rb") as file:
            file.seek(where.offset)
            left = where.length
            while left:
                piece = file.read(min(size, left))
                if not piece:
                    raise ValueError(f"{file.name} ends too early: the checkpoint is damaged, {_ANOTHER}")
                left -= len(piece)
                yield piece


class _Into(LoadPlanner):
    """Reads into one tensor, or stores the bytes of one object."""

    def __init__(self, target: Tensor | None) -> None:
        self.target = target
        self.data: io.BytesIO | None = None

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.data = value

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return _narrow(cast(Tensor, self.target), read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


def _narrow(tensor: Tensor, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor

"""The metadata of a distributed checkpoint, read without executing anything: torch's own reader runs it."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.metadata import Metadata

from ..pickles import unpickle
from ..private import _MEM_FORMAT_ENCODING, _get_layout, _StorageInfo


def read_metadata(content: bytes) -> Metadata:
    """What the file `.metadata` of a checkpoint says.

    Raises:
        NotAllowed: it names something that torch does not write there.
        pickle.UnpicklingError: it is damaged, or no such file.
    """
    found = unpickle(content, _ALLOWED)
    if not (
        isinstance(found, Metadata)
        and isinstance(found.state_dict_metadata, dict)
        and isinstance(found.storage_data, dict)
    ):
        raise pickle.UnpicklingError("it does not describe a checkpoint")
    return found


def _named(*classes: Any) -> dict[str, Any]:
    return {f"{one.__module__}.{one.__qualname__}": one for one in classes}


def _joined(*parts: str) -> str:
    return "/".join(parts)


_ALLOWED: dict[str, Any] = {
    **_named(
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.BytesStorageMetadata,
        metadata.TensorStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        _MEM_FORMAT_ENCODING,
        _StorageInfo,
    ),
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": _get_layout,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    # Where it was saved, which nobody asks for. Python 3.13 moved the module.
    **{f"{module}.{kind}Path": _joined for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")},
}
"""What torch writes there: the name of a class -> what is made of it."""

"""Reads the metadata of a distributed checkpoint without executing code, which torch's own reader would do."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.metadata import Metadata

from ..pickles import unpickle
from ..private import _MEM_FORMAT_ENCODING, _get_layout, _StorageInfo


def read_metadata(content: bytes) -> Metadata:
    """Parse the content of a checkpoint's `.metadata` file.

    Raises:
        NotAllowed: it refers to something that torch does not write there.
        pickle.UnpicklingError: it is damaged, or another kind of file.
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
    return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes}


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
    # The path where it was saved, which is not used. Python 3.13 moved the module.
    **{f"{module}.{kind}Path": _joined for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")},
}
"""The names that torch writes there -> the class or function to use for them."""

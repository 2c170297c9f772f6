"""Checkpoints on disk: their contents, whether they fit a run, and conversion of moments."""

from typing import TYPE_CHECKING

from ..lazy import lazy_attributes

__all__ = ["check_checkpoint", "check_savable"]

# torch takes seconds to import: the command line answers without it.
if TYPE_CHECKING:
    from .check import check_checkpoint, check_savable
else:
    __getattr__, __dir__ = lazy_attributes(__name__, {"check_checkpoint": "check", "check_savable": "check"})

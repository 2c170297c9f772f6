"""Checkpoints on disk: what one holds, whether it fits, and how AdamW's becomes AdamMini's and back."""

from .check import check_checkpoint, check_savable

__all__ = ["check_checkpoint", "check_savable"]

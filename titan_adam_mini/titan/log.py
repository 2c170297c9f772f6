"""Logging from one rank only."""

import logging

import torch.distributed as dist

_logger = logging.getLogger("titan_adam_mini")


def log_on_rank_0(level: int, message: str) -> None:
    """Log a message on rank 0, or in a single process."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        _logger.log(level, message)

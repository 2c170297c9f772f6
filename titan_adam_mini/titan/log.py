"""A line of log that a run says once, not on every rank."""

import logging

import torch.distributed as dist

_logger = logging.getLogger("titan_adam_mini")


def say(level: int, line: str) -> None:
    """Log a line on rank 0, or on the one process there is."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        _logger.log(level, line)

"""Adam-mini for torchtitan and FSDP2: AdamW with one second moment per Hessian block (arXiv 2406.16793)."""

from .optimizer import AdamMini
from .partition import ROLES, Geometry, Partition

__all__ = ["ROLES", "AdamMini", "Geometry", "Partition"]

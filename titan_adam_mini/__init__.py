"""Adam-mini for torchtitan and FSDP2: AdamW with one second moment per Hessian block (arXiv 2406.16793)."""

from typing import TYPE_CHECKING

from .lazy import lazy_attributes

__all__ = ["ROLES", "AdamMini", "Geometry", "Partition"]

# torch takes seconds to import: the command line answers without it.
if TYPE_CHECKING:
    from .optimizer import AdamMini
    from .partition import ROLES, Geometry, Partition
else:
    __getattr__, __dir__ = lazy_attributes(
        __name__, {"AdamMini": "optimizer", "ROLES": "partition", "Geometry": "partition", "Partition": "partition"}
    )

"""What torchtitan 0.2 sees: importing this module makes the optimizer name "AdamMini" known to it.

A run needs one line, ``[experimental] custom_import = "titan_adam_mini.titan"``. A module of your own that is already
named there imports this one; a fork with its own ``TrainSpec`` may pass :func:`build_optimizers` to it instead.
"""

from titan_adam_mini.titan.builder import AdamMiniContainer
from titan_adam_mini.titan.register import build_optimizers, enable

__all__ = ["AdamMiniContainer", "build_optimizers"]

enable()

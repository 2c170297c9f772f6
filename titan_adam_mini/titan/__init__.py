"""What torchtitan 0.2 sees: importing this module makes the optimizer name "AdamMini" known to it.

A run needs one line, ``[experimental] custom_import = "titan_adam_mini.titan"``. A module of your own that is already
named there imports this one; a fork with its own ``TrainSpec`` may pass :func:`build_optimizers` to it instead. What
else this package can change in torchtitan is switched on by :func:`enable`, or by an environment variable for each:
docs/torchtitan.md.

Raises ImportError, with the versions, if the installed torchtitan is not one that this package works with.
"""

import logging

from titan_adam_mini.titan import private

private.check_version()
try:
    from titan_adam_mini.titan.builder import AdamMiniContainer
    from titan_adam_mini.titan.device import has_accelerator
    from titan_adam_mini.titan.features import is_installed
    from titan_adam_mini.titan.register import build_optimizers, enable
except ImportError as error:
    if (error.name or "").startswith("torchtitan."):
        raise private.unsupported(str(error)) from error
    raise

__all__ = ["AdamMiniContainer", "build_optimizers", "enable"]

enable()
if not (has_accelerator() or is_installed("cpu")):
    logging.getLogger("titan_adam_mini").info(
        "No accelerator found: torchtitan trains on the CPU with the environment variable TITAN_ADAM_MINI_CPU=1."
    )

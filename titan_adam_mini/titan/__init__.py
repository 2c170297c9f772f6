"""The torchtitan 0.2 integration: importing this module registers the optimizer name "AdamMini".

A run needs one line, ``[experimental] custom_import = "titan_adam_mini.titan"``. If you already have a module there,
import this one from it; a fork with its own ``TrainSpec`` may pass :func:`build_optimizers` to it instead. Further
features are switched on by :func:`enable`, or by an environment variable each: docs/torchtitan.md.

Raises ImportError, with the versions, if the installed torchtitan is not supported.
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
        "No accelerator found: set the environment variable TITAN_ADAM_MINI_CPU=1 to train on the CPU."
    )

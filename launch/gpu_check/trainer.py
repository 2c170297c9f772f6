"""torchtitan's trainer, also where tensorboard is not installed: torchtitan imports it even if it is not used."""

import importlib.util
import runpy
import sys
from types import ModuleType

if __name__ == "__main__":
    if importlib.util.find_spec("tensorboard") is None:
        nothing = ModuleType("torch.utils.tensorboard")
        setattr(nothing, "SummaryWriter", None)  # noqa: B010
        sys.modules["torch.utils.tensorboard"] = nothing
    runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)

"""Imported for its effect: numba has compiled the CPU engine's loops, in half a minute the first time, or read them.

Of processes that do so at the same time, the first compiles and the others read.
"""

import fcntl
import os
from pathlib import Path

import torch

from titan_adam_mini import AdamMini

_folder = os.open(Path(__file__).parent, os.O_RDONLY)
fcntl.flock(_folder, fcntl.LOCK_EX)
for dtype in (torch.float32, torch.float64):
    param = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = AdamMini([("w1.weight", param)])
    param.grad = torch.ones_like(param)
    optimizer.step()
os.close(_folder)

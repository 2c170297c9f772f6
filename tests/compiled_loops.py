"""Imported for its effect: numba has compiled the CPU engine's loops, in half a minute the first time, or read them."""

import torch

from titan_adam_mini import AdamMini

for dtype in (torch.float32, torch.float64):
    param = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = AdamMini([("w1.weight", param)])
    param.grad = torch.ones_like(param)
    optimizer.step()

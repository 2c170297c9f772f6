"""`torch.compile` around a step: the step runs as it is, in a process of its own, since what failed was the heap."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from torch import nn
from torch._dynamo.utils import counters

from titan_adam_mini import AdamMini


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 300), nn.LayerNorm(300))
    names = {"0": "w1", "2": "w2", "3": "norm"}
    named = [(f"{names[name.split('.')[0]]}.{name.split('.')[1]}", value) for name, value in model.named_parameters()]
    return model, AdamMini(named, lr=1e-2)


def trained(how):
    model, optimizer = made()
    hooks = []
    optimizer.register_step_pre_hook(lambda *_: hooks.append("before"))
    optimizer.register_step_post_hook(lambda *_: hooks.append("after"))
    inputs = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))

    def forward(x):
        return model(x).square().sum()

    def training_step(x):
        optimizer.zero_grad()
        loss = forward(x)
        loss.backward()
        optimizer.step()
        return loss

    def everything(x):
        optimizer.init_state()
        loss = training_step(x)
        optimizer.load_state_dict(optimizer.state_dict())
        return loss

    compiled = lambda function: torch.compile(function, backend="eager")
    if how == "step":
        step = compiled(optimizer.step)
    elif how in ("training step", "everything"):
        whole = compiled(training_step if how == "training step" else everything)
    for x in inputs:
        if how == "eager":
            training_step(x)
        elif how == "step":
            optimizer.zero_grad()
            forward(x).backward()
            step()
        else:
            whole(x)
    assert hooks == ["before", "after"] * len(inputs), hooks
    assert {float(state["step"]) for state in optimizer.state.values()} == {float(len(inputs))}
    return [param.detach() for param in model.parameters()]


wants = trained("eager")
for how, most in (("step", 0), ("training step", 8), ("everything", 8)):
    torch._dynamo.reset()
    counters.clear()
    gots = trained(how)
    assert all(torch.equal(want, got) for want, got in zip(wants, gots)), how
    assert counters["stats"]["unique_graphs"] <= most, (how, counters)
print("same bits")
"""


@pytest.mark.slow
def test_a_compiled_step_gives_the_bits_of_an_eager_one() -> None:
    """`optimizer.step` alone, forward, backward and step in one function, and with all that AdamMini has beside it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "same bits\n"), done.stderr

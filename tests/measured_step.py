"""A training step on real memory, its peaks taken from torch's CPU allocator: what a simulation is held against.

Run in a process of its own. One rank is played of N, with collectives that move nothing, so every tensor has its size
and none its value.
"""

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from real_memory import local, storages

from titan_adam_mini.memory import simulate
from titan_adam_mini.offline.build import built, configured
from titan_adam_mini.titan.device import prepare_model_parts


def measured(arguments: list[str], ngpu: int, rank: int) -> dict[str, Any]:
    """Bytes: peak of forward and backward, and, per optimizer, its state and the peak of clipping and step."""
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {}
    with built(configured(arguments, ngpu), ngpu, rank) as model:
        for part in model.parts:
            part.to_empty(device="cpu")
            part.train()
            for param in part.parameters():
                local(param).detach().zero_()
        prepare_model_parts(model.parts)
        params = [param for part in model.parts for param in part.parameters()]
        held, _ = storages([*params, *(buffer for part in model.parts for buffer in part.buffers())])
        peak, grew = _peak(lambda: simulate._train(model, None))
        found["forward and backward"] = held + peak
        held += grew
        for name in ("AdamW", "AdamMini"):
            optimizers = [simulate._optimizer(part, model, name) for part in model.parts]
            _peak(lambda made=optimizers: [one.step() for one in made])  # type: ignore[misc]
            state, _ = storages([tensor for one in optimizers for tensor in simulate.state_of(one)])
            step, _ = _peak(lambda made=optimizers: simulate._clip_and_step(model, made))  # type: ignore[misc]
            found[name] = {"state": state, "step": held + state + step}
            del optimizers
            gc.collect()
    return found


def _peak(work: Callable[[], Any]) -> tuple[int, int]:
    """What was allocated at once at most, and what is left of it."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now

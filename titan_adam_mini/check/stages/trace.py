"""Analysis of kernels and synchronisations in a profiler's trace; the stage `trace` profiles real training steps.

A decoder under `fully_shard` on all ranks: forward, backward and AdamMini, with torch.profiler on every rank.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile, record_function

from ...optimizer import AdamMini
from ..decoder import Decoder, Sizes, loss_of, shard_data
from ..stage import Context, Result, engine_of, on_ranks

STEPS = 3
"""Profiled steps, after the same number of unprofiled ones."""
SMALL = Sizes(vocab=64, dim=32, layers=2, n_heads=4, n_kv_heads=2, head_dim=24, hidden=48, tokens=16)
LARGE = Sizes(vocab=8192, dim=1024, layers=8, n_heads=8, n_kv_heads=2, head_dim=128, hidden=2816, tokens=512)
LAUNCHES = ("cuda_runtime", "cuda_driver")
Span = tuple[float, float]


@dataclass
class Trace:
    """The complete events of a chrome trace."""

    events: list[dict[str, Any]]

    def spans(self, name: str) -> list[tuple[Any, Span]]:
        """(thread, start and end) of every host-side range of this name."""
        return [
            (
                (event.get("pid"), event.get("tid")),
                (float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0))),
            )
            for event in self.events
            if event.get("name") == name and event.get("cat") == "user_annotation"
        ]

    def calls(self, name: str) -> list[dict[str, Any]]:
        """CUDA calls that the host made inside the ranges of this name, on the same thread."""
        spans = self.spans(name)
        return [
            event
            for event in self.events
            if event.get("cat") in LAUNCHES
            and any(
                thread == (event.get("pid"), event.get("tid")) and low <= float(event["ts"]) <= high
                for thread, (low, high) in spans
            )
        ]

    def work(self, name: str, *categories: str) -> list[dict[str, Any]]:
        """Device events launched by those calls, of the categories "kernel", "gpu_memcpy", "gpu_memset"."""
        asked = {_correlation(event) for event in self.calls(name)} - {None}
        return [event for event in self.events if event.get("cat") in categories and _correlation(event) in asked]

    def device(self, *categories: str) -> int:
        """Number of events of these categories, from any caller."""
        return sum(event.get("cat") in categories for event in self.events)

    def waits(self, name: str) -> list[str]:
        """Names of calls inside the ranges that make the host wait, and of copies from the device to the host."""
        found = [event["name"] for event in self.calls(name) if "Synchronize" in event["name"]]
        found += [event["name"] for event in self.work(name, "gpu_memcpy") if "DtoH" in event["name"]]
        return found


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")


def traced(function: Callable[[], None], times: int, cuda: bool) -> Trace:
    """The trace of `function`, called `times` times, each in a range named "check.step"."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    if cuda:
        with profile(activities=activities):  # the first profile initialises tracing and may miss events
            torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    with profile(activities=activities) as seen:
        for _ in range(times):
            with record_function("check.step"):
                function()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text(errors="replace"))["traceEvents"]
    return Trace([event for event in events if event.get("ph") == "X"])


def run(context: Context) -> Result:
    """Passes without synchronisations and copies to the host inside a step; overlap is only reported."""
    ranks = on_ranks(context, on_rank)
    waits = sorted({wait for result in ranks for wait in result["waits"]})
    numbers: dict[str, Any] = {"waits": waits, **{key: value for key, value in ranks[0].items() if key != "waits"}}
    steps = [result["steps"] for result in ranks]
    good = not waits and all(number == STEPS for number in steps) and all(result["finite"] for result in ranks)
    if not context.cuda:
        return Result(
            good, f"{STEPS} steps with their exchange and update seen on {context.ngpu} ranks; no GPU", numbers
        )
    first = ranks[0]
    good = good and first["kernels"] > 0
    if context.ngpu == 1:
        overlap = "nothing is exchanged on one GPU"
    else:
        overlapped = sum(result["overlap"] for result in ranks) / max(1e-9, sum(result["exchange"] for result in ranks))
        numbers["overlap"] = overlapped
        overlap = f"exchange {first['exchange']:.0f} us per step, {overlapped:.0%} of it beside update kernels"
    line = f"waits in a step: {', '.join(waits) or 'none'}; {first['kernels']:g} kernels, {first['copies']:g} copies"
    return Result(good, f"{line} and {first['update']:.0f} us of update kernels per step; {overlap}", numbers)


def on_rank(context: Context, rank: int) -> dict[str, Any]:
    """Results from the trace of this rank's steps; times in microseconds per step."""
    sizes, device = LARGE if context.cuda else SMALL, context.of_rank(rank)
    model = Decoder(sizes).to(device)
    shard_data(model, init_device_mesh(context.device, (context.ngpu,), mesh_dim_names=("dp",)))
    heads: dict[str, Any] = {"n_heads": sizes.n_heads, "n_kv_heads": sizes.n_kv_heads}
    optimizer = AdamMini(model.named_parameters(), lr=1e-3, fused=True, **heads)
    engine = engine_of(optimizer, context.cuda)
    generator = torch.Generator().manual_seed(rank)
    text = torch.randint(sizes.vocab, (2, sizes.tokens + 1), generator=generator).to(device)
    losses = []

    def step() -> None:
        loss = loss_of(model(text[:, :-1]), text[:, 1:])
        loss.backward()
        with record_function("check.optimizer"):
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    for _ in range(STEPS):
        step()
    seen = traced(step, STEPS, context.cuda)
    update = seen.work("AdamMini.update", "kernel")
    exchange = [event for event in seen.work("AdamMini.exchange", "kernel") if "nccl" in event["name"].lower()]
    return {
        "engine": engine,
        "waits": seen.waits("check.optimizer"),
        "kernels": len(seen.work("check.optimizer", "kernel")) / STEPS,
        "copies": len(seen.work("check.optimizer", "gpu_memcpy", "gpu_memset")) / STEPS,
        "update": sum(float(event["dur"]) for event in update) / STEPS,
        "exchange": sum(float(event["dur"]) for event in exchange) / STEPS,
        "overlap": shared(_intervals(exchange), _intervals(update)) / STEPS,
        "steps": len(seen.spans("AdamMini.exchange")),
        "finite": bool(torch.isfinite(torch.stack(losses)).all()),
    }


def _intervals(events: list[dict[str, Any]]) -> list[Span]:
    return [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in events]


def shared(some: list[Span], others: list[Span]) -> float:
    """Total overlap of `some` with `others`; spans of the same list must not overlap."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in some for b in others)

"""What ranks are given before a run: a `memory` module for the CPU, and a count of the run's own at its end."""

import gc
import json
from pathlib import Path
from typing import Any

import torch

_IN_USE = {"state": "active_allocated", "frames": []}


class LiveTensors:
    """The part of `torch.cuda.memory` that torchtitan calls: each storage that is alive is a segment of one block."""

    def _record_memory_history(self, max_entries: int) -> None:
        assert max_entries == 100_000

    def _snapshot(self) -> dict[str, Any]:
        gc.collect()
        storages = {}
        for one in gc.get_objects():
            if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu":
                storage = one.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            if hasattr(type(one), "_local_tensor"):
                storage = one._local_tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return {
            "segments": [
                {
                    "device": 0,
                    "address": address,
                    "total_size": size,
                    "blocks": [{"address": address, "size": size, "requested_size": size, **_IN_USE}],
                }
                for address, size in storages.items()
                if size
            ],
            "device_traces": [[]],
        }


def give_memory(rank: int, out: str) -> None:
    from titan_adam_mini.titan import device, enable

    enable("cpu", "named_snapshots")
    device._cpu.memory = LiveTensors()  # type: ignore[union-attr]
    count_at_the_end(rank, out)


def count_at_the_end(rank: int, out: str) -> None:
    """Write the bytes of parameters, gradients and state into a file, counted element by element."""
    from torchtitan.components.metrics import MetricsProcessor

    def count(tensors: Any) -> int:
        return sum(one.numel() * one.itemsize for one in (getattr(each, "_local_tensor", each) for each in tensors))

    def close(self: Any) -> None:
        params = [param for part in self.model_parts for param in part.parameters()]
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        sizes = {key: count(state[key] for state in states) for key in states[0]}
        sizes |= {"parameters": count(params), "gradients": count(param.grad for param in params)}
        Path(f"{out}.rank{rank}.json").write_text(json.dumps(sizes))
        kept(self)

    kept = MetricsProcessor.close
    MetricsProcessor.close = close

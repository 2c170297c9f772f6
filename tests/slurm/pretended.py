"""Plays torchrun and the ranks of one node in one small process, without torch: for tests of the batch scripts alone.

It takes launch/torchrun.py's command line from launch/slurm/node.sh and leaves what torchrun and torchtitan's trainer
leave: the ranks' logs, checkpoints, the progress file, the list of failed ranks, their exit status. Nodes meet after
every step, and one whose peer is gone fails as gloo does. FAULT and STEP_SECONDS are those of faulty.py.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

SAVED, STUCK = 75, 76


class Peers:
    """The other nodes of this attempt."""

    def __init__(self, nodes: int, node: int, meeting: Path) -> None:
        self._pipes: list[TextIO] = []
        self._first = node == 0
        if self._first:
            with socket.create_server(("127.0.0.1", 0)) as server:
                meeting.with_suffix(".new").write_text(str(server.getsockname()[1]))
                os.replace(meeting.with_suffix(".new"), meeting)
                self._pipes = [server.accept()[0].makefile("rw") for _ in range(nodes - 1)]
        else:
            while not meeting.exists():
                time.sleep(0.05)
            self._pipes = [socket.create_connection(("127.0.0.1", int(meeting.read_text()))).makefile("rw")]

    def largest(self, number: int) -> int:
        """The largest of the nodes' numbers; RuntimeError if a node is gone."""
        try:
            if not self._first:
                self._write(number)
            number = max([number, *(int(pipe.readline()) for pipe in self._pipes)])
            if self._first:
                self._write(number)
        except (OSError, ValueError):
            raise RuntimeError("Connection closed by peer") from None
        return number

    def _write(self, number: int) -> None:
        for pipe in self._pipes:
            pipe.write(f"{number}\n")
            pipe.flush()


class Node:
    """One node of an attempt."""

    def __init__(self, words: list[str]) -> None:
        own, flags = words[: words.index("-m")], words[words.index("-m") + 2 :]
        mine = dict(word.removeprefix("--").split("=", 1) for word in own if "=" in word)
        pairs = zip(flags, [*flags[1:], ""], strict=True)
        self.flags = {name.removeprefix("--"): value for name, value in pairs if name.startswith("--")}
        self.nodes, self.node, ranks = (int(mine[key]) for key in ("nnodes", "node-rank", "nproc-per-node"))
        self.attempt = Path(os.environ["ATTEMPT"])
        self.logs = {}
        for rank in range(self.node * ranks, (self.node + 1) * ranks):
            self.logs[rank] = open(self.attempt / f"rank-{rank:05}.log", "w", buffering=1)  # noqa: SIM115
        self.heard = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)
        self.checkpoints = Path(self.flags["job.dump_folder"]) / "checkpoint"
        self.fault: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.first = 0
        self.saved: int | None = None

    def _hear(self, number: int, frame: object) -> None:
        self.heard = number

    def main(self) -> int:
        """The exit status."""
        if "no.such_flag" in self.flags:
            self.log("Unrecognized options: --no.such_flag")
            return self.failed(dict.fromkeys(self.logs, ("", 2)))
        try:
            return self.train()
        except Exception as error:
            return self.failed(dict.fromkeys(self.logs, (f"{type(error).__name__}: {error}", 1)))

    def train(self) -> int:
        if self.flags.get("parallelism.tensor_parallel_degree", "1") != "1":
            raise ValueError("the mesh does not divide")
        steps, every = int(self.flags["training.steps"]), int(self.flags["checkpoint.interval"])
        peers = Peers(self.nodes, self.node, self.attempt / "meeting")
        loss = self.load()
        self.progress(self.first)
        if peers.largest(self.heard):
            return self.failed(dict.fromkeys(self.logs, ("", SAVED)))
        for step in range(self.first + 1, steps + 1):
            time.sleep(0 if self.restart else float(os.environ.get("STEP_SECONDS", "0")))
            if status := self.fail(step):
                return status
            peers.largest(0)
            self.log(f"step: {step}  loss: {loss:.5f}  tps: 1,000")
            loss *= 0.97 - (self.flags.get("optimizer.name") == "AdamW") / 1000
            leaves = peers.largest(self.heard) if step < steps else 0
            if step < steps and (leaves or step % every == 0):
                self.save(step, loss)
            self.progress(step)
            if leaves:
                return self.failed(dict.fromkeys(self.logs, ("", SAVED)))
        return 0

    def fail(self, step: int) -> int:
        """Do what FAULT says, if it is now and here; the exit status, 0 if it is not."""
        fault = self.fault
        if not fault or fault["rank"] not in self.logs or fault["step"] != step:
            return 0
        if fault["restart"] not in (-1, self.restart):
            return 0
        if fault["what"] == "raise":
            raise RuntimeError("a fault of the test")
        kill = (f"Signal 9 (SIGKILL) received by PID {os.getpid()}", 128 + signal.SIGKILL)
        return self.failed({fault["rank"]: {"kill": kill, "hang": ("", STUCK)}[fault["what"]]})

    def failed(self, ranks: dict[int, tuple[str, int]]) -> int:
        """Write down what torchrun knows of ranks that ended with an error; their exit status."""
        trace = traceback.format_exc() if sys.exc_info()[0] else ""
        node = os.environ["SLURMD_NODENAME"]
        known = [
            {"rank": rank, "node": node, "status": status, "time": time.time(), "error": error, "traceback": trace}
            for rank, (error, status) in ranks.items()
        ]
        file = Path(os.environ["FAILURES"])
        file.with_suffix(".new").write_text(json.dumps(known))
        os.replace(file.with_suffix(".new"), file)
        return max(status for _, status in ranks.values())

    def log(self, line: str) -> None:
        """A line of rank 0."""
        if 0 in self.logs:
            self.logs[0].write(f"{line}\n")

    def load(self) -> float:
        """The loss of the step after the last checkpoint."""
        found = [(int(file.name.removeprefix("step-")), file) for file in self.checkpoints.glob("step-*")]
        if not found:
            return 8 + float(self.flags.get("debug.seed", "0")) / 100
        self.first, file = max(found)
        self.saved = self.first
        return float(json.loads(file.read_text()))

    def save(self, step: int, loss: float) -> None:
        """A checkpoint, from rank 0."""
        self.saved = step
        if 0 in self.logs:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.checkpoints / "new").write_text(json.dumps(loss))
            os.replace(self.checkpoints / "new", self.checkpoints / f"step-{step}")

    def progress(self, step: int) -> None:
        """The file that titan_adam_mini/titan/interruption.py writes."""
        if 0 in self.logs:
            file = Path(os.environ["TITAN_ADAM_MINI_PROGRESS"])
            told = {"first": self.first, "step": step, "saved": self.saved, "time": time.time()}
            file.with_suffix(".new").write_text(json.dumps(told))
            os.replace(file.with_suffix(".new"), file)


if __name__ == "__main__":
    sys.exit(Node(sys.argv[1:]).main())

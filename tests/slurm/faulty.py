"""torchtitan's trainer with a fault, for TRAIN_FILE: FAULT is JSON of what, rank, step and restart (-1: in every one).

STEP_SECONDS makes every step of the job's first start that long, so that a test has time to do something to the run.
"""

import json
import os
import signal
import time

from torchtitan.train import Trainer, main


class Faulty(Trainer):
    """A trainer that goes wrong where it is told to."""

    def train_step(self, data_iterator) -> None:
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        time.sleep(0 if restart else float(os.environ.get("STEP_SECONDS", "0")))
        fault = json.loads(os.environ.get("FAULT", "{}"))
        here = {"rank": int(os.environ["RANK"]), "step": self.step}
        if fault and here.items() <= fault.items() and fault["restart"] in (-1, restart):
            self.fail(fault["what"])
        super().train_step(data_iterator)

    def fail(self, what: str) -> None:
        """Raise, hang or die."""
        if what == "raise":
            raise RuntimeError("a fault of the test")
        if what == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Faulty)

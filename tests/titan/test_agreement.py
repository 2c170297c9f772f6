"""Ranks agree on one step to leave after: many ranks, in threads of this process, around torch's in-process store."""

import random
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from titan_adam_mini.titan.agreement import Agreement

STEPS = 40


class Ranks:
    """Ranks in threads, each at its own pace, and at most `ahead` boundaries before the slowest."""

    def __init__(self, ranks: int, ahead: int, asks: dict[int, tuple[int, int]], seed: int) -> None:
        """`asks`: rank -> (step, number)."""
        self.store = dist.HashStore()
        self.ahead, self.asks, self.seed = ahead, asks, seed
        self.at, self.moved = [0] * ranks, threading.Condition()
        self.left: dict[int, tuple[int, int]] = {}
        self.threads = [threading.Thread(target=self.run, args=(rank,), daemon=True) for rank in range(ranks)]

    def run(self, rank: int) -> None:
        pace = random.Random(self.seed + rank)
        agreement = Agreement(self.store.clone(), rank, len(self.at), 0, timeout=20.0, interval=0.001)
        asks, number = self.asks.get(rank, (STEPS + 1, 0))
        for step in range(1, STEPS + 1):
            time.sleep(pace.random() * 2e-3)
            with self.moved:  # the collectives of a step, which the host may be ahead of
                assert self.moved.wait_for(lambda step=step: min(self.at) >= step - self.ahead, 20.0)
            why = agreement.should_exit(step, number if step >= asks else 0)
            with self.moved:
                self.at[rank] = step
                self.moved.notify_all()
            if why:
                self.left[rank] = (step, why)
                break
        agreement.barrier()
        agreement.close()

    def go(self) -> dict[int, tuple[int, int]]:
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        return self.left


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_all_ranks_leave_at_the_same_step(ahead: int, seed: int) -> None:
    ranks, asked, asker = 5, 3 + seed, seed % 5
    left = Ranks(ranks, ahead, {asker: (asked, 15)}, seed).go()
    assert len(left) == ranks
    ((step, why),) = set(left.values())
    assert why == 15
    assert asked <= step <= asked + ahead


def test_several_ask_at_once() -> None:
    left = Ranks(4, 2, {rank: (7 + rank % 2, 10) for rank in range(4)}, 0).go()
    ((step, why),) = set(left.values())
    assert len(left) == 4 and why == 10
    assert 7 <= step <= 9


def test_nobody_leaves_unasked() -> None:
    assert Ranks(3, 1, {}, 0).go() == {}


def alone(**options: Any) -> Agreement:
    """Rank 0 of two, the other of which never answers."""
    return Agreement(dist.HashStore(), 0, 2, 0, interval=0.001, **options)


def test_a_rank_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    agreement = alone(timeout=0.2)
    assert agreement.should_exit(1, 0) == 0
    with pytest.raises(TimeoutError, match=r"asked to exit at step 2, but not all ranks responded within 0\.2 seconds"):
        agreement.should_exit(2, 15)
    agreement.barrier()
    agreement.close()
    assert not agreement._thread.is_alive()

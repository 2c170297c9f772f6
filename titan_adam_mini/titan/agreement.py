"""Ranks that step together agree on one step to leave after, when any of them asks for it.

Nothing is sent in a step: on every rank a thread asks the store, once a second, whether somebody wants to leave. If so,
it fixes and publishes the last step boundary that its rank has begun; all leave at the latest of them, plus one. A
rank whose answer is fixed begins no other boundary before it knows the decision, so none goes past it.

The store is the one through which the ranks met. Unlike a process group of its own it needs no connections between
ranks, and a rank that fails has no collective in flight that would keep it from ending.
"""

import atexit
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from datetime import timedelta
from typing import Any

_ASKED, _DECIDED, _HERE, _ALL_HERE = "asked", "decided", "here", "all here"


class Agreement:
    """What one rank knows of it.

    Args:
        store: a connection to the ranks' store, for this object alone.
        rank, ranks: this one, and their number.
        step: the last step boundary before the first call of :meth:`exits`, the same on all ranks.
        patience: seconds for the other ranks' answers.
        every: seconds between two questions.
    """

    def __init__(
        self, store: Any, rank: int, ranks: int, step: int, patience: float = 300.0, every: float = 1.0
    ) -> None:
        self._store, self._rank, self._ranks, self._patience, self._every = store, rank, ranks, patience, every
        self._begun, self._fixed, self._asks = step, False, False
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._decision: Future[tuple[int, int]] = Future()
        self._thread = threading.Thread(target=self._listen, name="titan_adam_mini.agreement", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside the store would abort the process as the interpreter ends

    def exits(self, step: int, number: int) -> int:
        """Whether all ranks leave at this step boundary, which each of them passes once and in order.

        Args:
            number: why this rank wants to leave, a number above 0; 0 if it does not.

        Returns:
            The number of a rank that wanted to; 0 if nobody leaves here.

        Raises:
            TimeoutError: a rank did not answer.
        """
        if number and not self._asks:
            self._asks = True
            self._store.set(_ASKED, str(number))
        with self._lock:
            if not (self._asks or self._fixed):
                self._begun = step
                return 0
        try:
            last, why = self._decision.result(self._patience)
        except NoAnswer:
            raise TimeoutError(
                f"a rank was asked to leave at step {step}, and not all ranks answered within {self._patience:g} "
                "seconds: one of them has ended or does not respond"
            ) from None
        return why if step >= last else 0

    def meet(self) -> None:
        """Wait until all ranks are here, or one of them has ended. Once."""
        try:
            if self._store.add(_HERE, 1) == self._ranks:
                self._store.set(_ALL_HERE, "")
            self._store.wait([_ALL_HERE], timedelta(seconds=self._patience))
        except RuntimeError:
            return

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(10.0)
        atexit.unregister(self.close)

    def _listen(self) -> None:
        try:
            if not self._known([_ASKED], self._every):
                return
            with self._lock:
                self._fixed = True
            self._store.set(self._answer(self._rank), str(self._begun))
            if self._rank == 0:
                answers = [self._answer(rank) for rank in range(self._ranks)]
                if not self._known(answers, self._every / 10):
                    return
                last = max(int(self._store.get(one)) for one in answers)
                self._store.set(_DECIDED, f"{last + 1} {int(self._store.get(_ASKED))}")
            if self._known([_DECIDED], self._every / 10):
                last, why = self._store.get(_DECIDED).split()
                self._decision.set_result((int(last), int(why)))
        except RuntimeError as error:  # the store is gone, and with it the rank or the launcher that kept it
            self._decision.set_exception(error)

    def _known(self, keys: list[str], every: float) -> bool:
        """Wait until the store has all of them; False if the thread is to end."""
        while not self._store.check(keys):
            if self._stopped.wait(every):
                return False
        return True

    @staticmethod
    def _answer(rank: int) -> str:
        return f"begun/{rank}"

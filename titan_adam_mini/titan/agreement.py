"""Agreement of all ranks on the step after which they exit, when any of them requests it.

Nothing is communicated in a step: on every rank a thread polls the store once a second for a request. If there is one,
it publishes the last step boundary that its rank has begun; all ranks exit one boundary after the latest of these. A
rank that has published its boundary does not begin another before it knows the decision, so none goes past it.

The store is that of the rendezvous. Unlike a separate process group it needs no connections between ranks, and a rank
that fails has no collective in flight that would keep it from exiting.
"""

import atexit
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import Any

_ASKED, _DECIDED, _HERE, _ALL_HERE = "asked", "decided", "here", "all here"


class Agreement:
    """One rank's part of the agreement.

    Args:
        store: a connection to the ranks' store, for this object alone.
        rank, ranks: this rank, and the number of ranks.
        step: the last step boundary before the first call of :meth:`should_exit`, the same on all ranks.
        timeout: seconds to wait for the other ranks.
        interval: seconds between two polls.
    """

    def __init__(
        self, store: Any, rank: int, ranks: int, step: int, timeout: float = 300.0, interval: float = 1.0
    ) -> None:
        self._store, self._rank, self._ranks, self._timeout, self._interval = store, rank, ranks, timeout, interval
        self._begun, self._fixed, self._requested = step, False, False
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._decision: Future[tuple[int, int]] = Future()
        self._thread = threading.Thread(target=self._listen, name="titan_adam_mini.agreement", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside the store would abort the process at interpreter exit

    def should_exit(self, step: int, number: int) -> int:
        """Whether all ranks exit at this step boundary; each rank calls this once per boundary, in order.

        Args:
            number: this rank's reason to exit (a signal number), or 0.

        Returns:
            The number of a rank that requested the exit; 0 if no rank exits here.

        Raises:
            TimeoutError: a rank did not respond.
        """
        if number and not self._requested:
            self._requested = True
            self._store.set(_ASKED, str(number))
        with self._lock:
            if not (self._requested or self._fixed):
                self._begun = step
                return 0
        try:
            last, why = self._decision.result(self._timeout)
        except FutureTimeout:
            raise TimeoutError(
                f"a rank was asked to exit at step {step}, but not all ranks responded within {self._timeout:g} "
                "seconds: one of them has ended or hangs"
            ) from None
        return why if step >= last else 0

    def barrier(self) -> None:
        """Wait until all ranks get here, or one of them has ended. To be called once."""
        try:
            if self._store.add(_HERE, 1) == self._ranks:
                self._store.set(_ALL_HERE, "")
            self._store.wait([_ALL_HERE], timedelta(seconds=self._timeout))
        except RuntimeError:
            return

    def close(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        self._thread.join(10.0)
        atexit.unregister(self.close)

    def _listen(self) -> None:
        try:
            if not self._known([_ASKED], self._interval):
                return
            with self._lock:
                self._fixed = True
            self._store.set(self._answer(self._rank), str(self._begun))
            if self._rank == 0:
                answers = [self._answer(rank) for rank in range(self._ranks)]
                if not self._known(answers, self._interval / 10):
                    return
                last = max(int(self._store.get(key)) for key in answers)
                self._store.set(_DECIDED, f"{last + 1} {int(self._store.get(_ASKED))}")
            if self._known([_DECIDED], self._interval / 10):
                last, why = self._store.get(_DECIDED).split()
                self._decision.set_result((int(last), int(why)))
        except RuntimeError as error:  # the process that hosts the store has ended
            self._decision.set_exception(error)

    def _known(self, keys: list[str], interval: float) -> bool:
        """Wait until the store has all keys; False if the thread is to stop."""
        while not self._store.check(keys):
            if self._stopped.wait(interval):
                return False
        return True

    @staticmethod
    def _answer(rank: int) -> str:
        return f"begun/{rank}"

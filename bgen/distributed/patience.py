"""Waiting for what takes long: one rank works in a thread, and all ranks agree every second that they still wait.

A collective fails when a rank comes to it later than its time-out, and a watchdog ends a process that it does not hear
from. So whatever may take longer than a step (a slow disk, an export) is waited for here.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from bgen.distributed import world as ranks
from bgen.errors import UserError

PACE = 1.0
"""Seconds between two rounds of the ranks."""


class Work:
    """Something that this rank does in a thread, beginning now.

    Parameters
    ----------
    action
        What to do; None: this rank has nothing to do.
    """

    def __init__(self, action: Callable[[], object] | None) -> None:
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None
        if action is not None:
            self._thread = threading.Thread(target=self._do, args=(action,), name="bgen-work", daemon=True)
            self._thread.start()

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # raised where all ranks are together
            self.error = error

    @property
    def idle(self) -> bool:
        """Whether there was nothing to do."""
        return self._thread is None

    @property
    def running(self) -> bool:
        """Whether it is still being done."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait for its end, at most so long."""
        if self._thread is not None:
            self._thread.join(seconds)


def nothing() -> None:
    """Do nothing: a beat that nobody hears."""


def wait(work: Work, beat: Callable[[], None] = nothing, deadline: float = math.inf) -> bool:
    """Wait until the work of every rank is done; all ranks call this together.

    Parameters
    ----------
    work
        This rank's.
    beat
        Called every second.
    deadline
        Moment of :func:`time.monotonic` until which a rank waits for its own.

    Returns
    -------
    False, on every rank, if the work of one was not done by its deadline.
    """
    while True:
        work.join(PACE)
        late = work.running and time.monotonic() > deadline
        state = ranks.agree_max(2 if late else int(work.running))
        beat()
        if state != 1:
            return state == 0


def together(action: Callable[[], object] | None, beat: Callable[[], None] = nothing) -> None:
    """Do something on the ranks that have an action while the others wait; however long it takes.

    Raises
    ------
    UserError
        On every rank, if the action of one raised it.
    RuntimeError
        On every other rank, if the action of one raised anything else; that rank raises what it was.
    """
    work = Work(action)
    wait(work, beat)
    failures = ranks.gather(None if work.error is None else (isinstance(work.error, UserError), str(work.error)))
    if work.error is not None:
        raise work.error
    for rank, failure in enumerate(failures):
        if failure is not None:
            by_user, text = failure
            raise UserError(text) if by_user else RuntimeError(f"rank {rank} failed: {text}")

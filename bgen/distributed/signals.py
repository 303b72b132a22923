"""Signals that ask a run to save and stop: SIGTERM (preemption, shutdown) and SIGUSR2 (Slurm's `--signal`).

The handler only sets a flag. The trainer combines the flags of all ranks at every step, so a signal to one rank stops
all of them at the same step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopSignals:
    """Context in which the signals set a flag instead of ending the process; earlier handlers are restored after it."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        # Python runs handlers in the main thread only; elsewhere (a notebook's worker) signals keep their meaning.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

"""The progress bar of a terminal, and plain lines where there is none (batch jobs, pipes). Written to stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bgen.passwords import without_passwords

# Without a terminal: at most a line in so many seconds.
SECONDS_PER_LINE = 10.0


def warn(message: str) -> None:
    """Print a warning on a rank that shows no progress."""
    with contextlib.suppress(OSError):
        print(f"warning: {without_passwords(message)}", file=sys.stderr, flush=True)


class ProgressLine:
    """Shows steps done, the time left, the losses and the speed.

    Parameters
    ----------
    title
        What is running.
    done, total
        Steps.
    shown
        False shows nothing but messages.
    """

    def __init__(self, title: str, done: int, total: int, shown: bool) -> None:
        self._title, self._total, self._shown = title, total, shown
        self._first, self._began = done, time.monotonic()
        self._console = Console(file=sys.stderr, highlight=False)
        self._bar: Progress | None = None
        self._spoke = 0.0
        if shown and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[figures]}"), console=self._console)
            self._task = self._bar.add_task(title, total=total, completed=done, figures="")
            self._bar.start()

    def update(self, step: int, figures: str = "") -> None:
        """Show ``step``; ``figures`` (loss, speed) replace those shown before."""
        if self._bar is not None:
            if figures:
                self._bar.update(self._task, completed=step, figures=figures)
            else:
                self._bar.update(self._task, completed=step)
        elif self._shown and figures and (step >= self._total or time.monotonic() - self._spoke >= SECONDS_PER_LINE):
            self._spoke = time.monotonic()
            self.say(f"{self._title} {step}/{self._total}{self._left(step)} {figures}")

    def _left(self, step: int) -> str:
        """Return how long the steps that are left will take, as fast as those so far; "" where nobody can tell."""
        if not self._first < step < self._total:
            return ""
        seconds = (time.monotonic() - self._began) / (step - self._first) * (self._total - step)
        return f" ({timedelta(seconds=round(seconds))} left)"

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            self._console.print(message, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leave the bar as it is and end it."""
        if self._bar is not None:
            self._bar.stop()

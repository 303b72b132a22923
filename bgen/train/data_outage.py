"""The training batches, also across an outage of the file system or the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from bgen.data.batch import CellBatch
from bgen.data.packed import PackedBatch
from bgen.errors import UserError
from bgen.train.stages.stage import Stage

# Seconds between two attempts, at most.
PAUSE = 10.0


class Batches:
    """A stage's batches from ``step`` on.

    The cells of a step are a pure function of the step, so after an outage the stage is simply asked again.

    Parameters
    ----------
    stage
        Gives the batches; an OSError of its iterator counts as an outage.
    step
        First step.
    patience
        Seconds that an outage may last.
    waiting
        Called at every attempt: at the first with what went wrong, at the others with None.
    """

    def __init__(self, stage: Stage, step: int, patience: float, waiting: Callable[[str | None], None]) -> None:
        self._stage, self._step, self._patience, self._waiting = stage, step, patience, waiting
        self._batches: Iterator[Sequence[CellBatch | PackedBatch]] | None = None

    def next(self) -> tuple[Sequence[CellBatch | PackedBatch], float]:
        """Return the micro batches of the next step, and the seconds spent waiting for them.

        Raises
        ------
        UserError
            If they cannot be read within the patience.
        """
        begin = time.perf_counter()
        pause, failed_at = 0.5, None
        while True:
            try:
                if self._batches is None:
                    self._batches = self._stage.train_batches(self._step)
                found = next(self._batches)
            except OSError as error:
                self._batches = None
                now = time.perf_counter()
                self._waiting(None if failed_at else f"the data cannot be read ({error}): trying again")
                failed_at = failed_at or now
                if now - failed_at > self._patience:
                    raise UserError(
                        f"The data could not be read for {self._patience:g} s (train.data_patience): {error}. "
                        "When the store is back, go on with --resume."
                    ) from error
                time.sleep(min(pause, PAUSE))
                pause *= 2
            else:
                self._step += 1
                return found, time.perf_counter() - begin

"""The training batches, also across an outage of the file system or the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.data.packed import PackedBatch
from bgen.distributed import world as ranks
from bgen.errors import UserError
from bgen.train.stages.stage import Stage

# Seconds between two attempts, at most.
PAUSE = 10.0
# Seconds between two looks at signals.
LOOK = 0.5
# Seconds of an outage after which the other ranks hear of it, at most.
ROUND = 20.0


class OutageStopped(UserError):
    """The data could not be read before the first step, and a signal ended the waiting: worth another try."""

    exit_code = 75


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
    longest
        Seconds that the other ranks may wait for this one.
    waiting
        Called at every attempt: at the first with what went wrong, at the others with None.
    stopped
        Whether a signal asked this rank to stop.

    Attributes
    ----------
    given_up
        What to tell the user once an outage has lasted longer than the patience.
    """

    def __init__(
        self,
        stage: Stage,
        step: int,
        patience: float,
        longest: float,
        waiting: Callable[[str | None], None],
        stopped: Callable[[], bool],
    ) -> None:
        self._stage, self._step, self._patience = stage, step, patience
        self._round, self._waiting, self._stopped = min(ROUND, longest / 4), waiting, stopped
        self._batches: Iterator[Sequence[CellBatch | PackedBatch]] | None = None
        self._failed_at: float | None = None
        self._pause = LOOK
        self.given_up: str | None = None

    def next(self, alone: bool) -> tuple[Sequence[CellBatch | PackedBatch] | None, float]:
        """Return the micro batches of the next step, and the seconds spent waiting for them.

        None instead of micro batches, if there are none yet and the other ranks should hear of it: because of a signal,
        because the patience has run out (``given_up`` says so), or because they have waited long.

        Parameters
        ----------
        alone
            Whether they cannot: then all of the outage is waited for here.

        Raises
        ------
        UserError
            If ``alone``, and the patience has run out or a signal has come.
        """
        begin = time.perf_counter()
        while True:
            try:
                if self._batches is None:
                    self._batches = self._stage.train_batches(self._step)
                found = next(self._batches)
            except OSError as error:
                self._batches = None
                self._failed(error)
                self._sleep()
                if alone and self.given_up is not None:
                    raise UserError(self.given_up) from error
                if alone and self._stopped():
                    raise OutageStopped(f"stopped by a signal while the data could not be read: {error}") from error
                if not alone and (
                    self.given_up is not None or self._stopped() or time.perf_counter() - begin > self._round
                ):
                    return None, time.perf_counter() - begin
            else:
                self._step += 1
                self._failed_at, self._pause = None, LOOK
                return found, time.perf_counter() - begin

    def valid(self, stopped: Callable[[], bool]) -> Iterator[tuple[CellBatch, Tensor]] | None:
        """Return the stage's held-out batches, once every rank has read its own.

        The ranks hear of each other after every attempt, so none waits for another longer than for one of these.

        Parameters
        ----------
        stopped
            Called after each attempt on every rank, with the same answer on all.

        Returns
        -------
        Iterator or None
            None on all ranks, if a signal has come, or if the patience of a rank has run out (``given_up`` says so).
        """
        while True:
            batches = None
            try:
                batches = self._stage.valid_batches()
            except OSError as error:
                self._failed(error)
            if not ranks.agree_max(batches is None):
                self._failed_at, self._pause = None, LOOK
                return batches
            if stopped() or ranks.agree_max(self.given_up is not None):
                return None
            self._sleep()

    def _failed(self, error: OSError) -> None:
        """Say what went wrong at this attempt, and give up if the outage has lasted longer than the patience."""
        now = time.perf_counter()
        self._waiting(None if self._failed_at else f"the data cannot be read ({error}): trying again")
        self._failed_at = self._failed_at or now
        if now - self._failed_at > self._patience:
            self.given_up = (
                f"The data could not be read for {self._patience:g} s (train.data_patience): {error}. "
                "When the store is back, go on with --resume."
            )

    def _sleep(self) -> None:
        """Pause before the next attempt, each time longer; a signal or the end of the patience ends the pause."""
        until = time.perf_counter() + self._pause
        self._pause = min(2 * self._pause, PAUSE)
        while self.given_up is None and not self._stopped() and time.perf_counter() < until:
            time.sleep(min(LOOK, max(0.0, until - time.perf_counter())))

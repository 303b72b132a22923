"""What a checkpoint of a run holds, and when it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from bgen.checkpoint import shards
from bgen.checkpoint.commit import Checkpoints, Frozen, SaveError, SaveHangs
from bgen.checkpoint.shards import Shards
from bgen.config.run import RunConfig
from bgen.distributed import world as ranks
from bgen.errors import UserError
from bgen.track.output import RunOutput
from bgen.train.engine.ema import EMA
from bgen.train.engine.engine import Engine, Pieces
from bgen.train.state import RunState


class SaveFailed(UserError):
    """The run had to end and could not save; worth another try when the disk is well again (EX_TEMPFAIL)."""

    exit_code = 75


class Weights:
    """The weights of a run beside those in training: the moving average and the best.

    Parameters
    ----------
    engine
        Holds those in training.
    config
        Settings.
    saved
        The checkpoint that the run goes on from.
    """

    def __init__(self, engine: Engine, config: RunConfig, saved: Shards | None) -> None:
        train = config.train
        self.engine = engine
        self.average = EMA(engine.partition.weights(), train.ema) if train.ema > 0 else None
        self.best: Pieces | None = None
        self.best_buffers: dict[str, Tensor] = {}
        if saved is None:
            return
        if self.average is not None:
            self.average.load(saved)
        if train.patience > 0 and shards.BEST in saved.kinds:
            here = engine.partition.weights()
            self.best = {
                (name, start): saved.read(shards.BEST, name, start, len(piece)).to(piece.device)
                for (name, start), piece in here.items()
            }
            self.best_buffers = {name: saved.whole(shards.BEST_FIXED, name) for name in saved.names(shards.BEST_FIXED)}

    @property
    def judged(self) -> Pieces | None:
        """The weights that evaluations judge: the average where there is one; None means those in training."""
        return None if self.average is None else self.average.pieces

    def keep_best(self) -> None:
        """Keep a copy of the weights that were just judged."""
        source = self.judged if self.judged is not None else self.engine.partition.weights()
        self.best = {place: piece.clone() for place, piece in source.items()}
        self.best_buffers = self.engine.buffers()

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU of all that this rank saves."""
        found = self.engine.partition.snapshot()
        for kind, pieces in ((shards.AVERAGE, self.judged), (shards.BEST, self.best)):
            for (name, start), piece in (pieces or {}).items():
                found[shards.key(kind, start, name)] = piece.to("cpu", copy=True)
        if ranks.current().is_main:
            fixed = {shards.FIXED: self.engine.buffers(), shards.BEST_FIXED: self.best_buffers}
            found |= {shards.key(kind, 0, name): t for kind, group in fixed.items() for name, t in group.items()}
        return found

    def frozen(self) -> Frozen | None:
        """What is not trained and is saved once; None if there is nothing."""

        def tensors() -> dict[str, Tensor]:
            return {shards.key(shards.FIXED, 0, name): tensor for name, tensor in self.engine.frozen().items()}

        return Frozen(self.engine.frozen_bytes, tensors) if self.engine.frozen_bytes else None

    def release(self) -> Any:
        """End the engine and return the module with the weights to export (best, else average, else last)."""
        module = self.engine.release(self.best if self.best is not None else self.judged)
        module.load_state_dict(self.best_buffers, strict=False)
        return module


class Saver:
    """Saves a run's checkpoints.

    Parameters
    ----------
    checkpoints
        Where they go.
    config, fingerprint
        Saved with each.
    event
        Adds a row to the record: what happened, and its values.
    output
        Where lines are printed; its record is brought to the disk before each commit.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: RunConfig,
        fingerprint: dict[str, Any],
        event: Callable[[str, dict[str, Any]], None],
        output: RunOutput,
    ) -> None:
        self.checkpoints, self.config, self.fingerprint = checkpoints, config, fingerprint
        self._event, self._output, self._failed = event, output, 0

    def begin(self, weights: Weights, state: RunState) -> str | None:
        """Start to save; what was still being saved is finished first.

        A failure is reported and training goes on; return what failed, if anything did.

        Raises
        ------
        SaveFailed
            After ``train.max_failed_saves`` failures in a row, or if one does not end.
        """
        self.finish()
        train = self.config.train
        text = json.dumps(
            {
                "state": state.to_json(),
                "fingerprint": self.fingerprint,
                "config": self.config.model_dump(mode="json"),
            },
            indent=1,
            allow_nan=False,
        )
        facts = {"ranks": ranks.current().size, "zero": train.zero, "optimizer": train.optimizer}
        shapes = weights.engine.partition.shapes
        failed = self._reported(
            lambda: self.checkpoints.begin(
                state.step, weights.tensors(), shapes, text, facts, weights.frozen(), self._output.sync
            ),
        )
        return failed if train.checkpoint_async else failed or self.finish()

    def advance(self, done: int, failed: int) -> None:
        """Bring what is being saved forward; see :meth:`Checkpoints.advance`."""
        self._reported(lambda: self.checkpoints.advance(done, failed))

    def finish(self) -> str | None:
        """Wait until what is being saved is saved; returns what failed, if anything did."""
        return self._reported(self.checkpoints.finish)

    def save_now(self, weights: Weights, state: RunState) -> None:
        """Save before the run ends.

        Raises
        ------
        SaveFailed
            If that was not possible.
        """
        failed = self.begin(weights, state) or self.finish()
        if failed is not None:
            raise SaveFailed(f"stopped at step {state.step} without saving: {failed}")

    def _reported(self, action: Callable[[], Path | None]) -> str | None:
        try:
            done = action()
        except SaveError as error:
            self._failed += 1
            self._event("save failed", {"reason": str(error)})
            self._output.say(f"warning: no checkpoint: {error}")
            most = self.config.train.max_failed_saves
            if isinstance(error, SaveHangs) or self._failed >= most:
                count = f"{self._failed} checkpoints in a row could" if self._failed > 1 else "a checkpoint could"
                raise SaveFailed(
                    f"{self.config.out}: {count} not be written, the last because: {error}. Mend that, and go on with "
                    f"--resume. (train.max_failed_saves={most})"
                ) from None
            return str(error)
        if done is not None:
            self._failed = 0
            self._event("checkpoint", {"checkpoint": done.name})
        return None

"""``bgen tune lr``: a learning-rate range test from the run's own start (Smith 2017, arXiv 1506.01186).

The rate grows exponentially from step to step, and the loss of each step is set against it: at first nothing happens,
then the loss falls, then it rises. The rate that is suggested is where it falls fastest, no higher than a tenth of the
one from which it rises. Batches and the first weights are those of the run, the same seed gives the same answer, and no
run folder is made.

DeepSpeed has the schedule (LRRangeTest), but not what comes of it: it would neither look at the losses nor stop. Our
engine sets the rate of every step anyway, so the schedule is one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from bgen.config.run import Config
from bgen.errors import UserError
from bgen.evaluate.reports.pictures import COLOURS, TEXT, clean, png
from bgen.files import write_whole
from bgen.store.open import open_data
from bgen.train.auto_micro_batch import settle
from bgen.train.engine.engine import Engine
from bgen.train.engine.step_seed import seed_step
from bgen.train.stages.registry import make_stage
from bgen.train.step_losses import StepLosses
from bgen.train.trainer import check

F64 = NDArray[np.float64]

LEAST_STEPS = 20
"""Steps of a test, at least."""

WIDTH = 30
"""Losses are smoothed by a Gaussian whose standard deviation is the test's steps over this."""

BELOW = 10.0
"""The suggestion is at most the rate from which the loss rises, over this."""

ROWS = 12
"""Rows of the table, about."""


@dataclass(frozen=True)
class RangeTest:
    """What a range test found.

    Attributes
    ----------
    rates, losses, smoothed
        Of each step, as far as the test came: learning rate, mean loss of the global batch before the step, and that
        smoothed over neighbouring steps.
    rises
        The rate from which the loss rises for good; None: it did not within the test.
    suggestion
        Learning rate, to two digits.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    rises: float | None
    suggestion: float

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**vars(self), "setting": self.setting}

    @property
    def setting(self) -> str:
        """The suggestion as a configuration takes it."""
        return f"train.learning_rate={self.suggestion:g}"

    def table(self) -> Table:
        """Return every so many steps, the one whose rate is suggested among them in bold."""
        table = Table(title=f"learning rate, {len(self.rates)} steps", title_justify="left")
        for name in ("step", "rate", "loss", "smoothed"):
            table.add_column(name, justify="right")
        nearest = int(np.abs(np.log(np.array(self.rates) / self.suggestion)).argmin())
        shown = {*range(0, len(self.rates), max(1, len(self.rates) // ROWS)), len(self.rates) - 1, nearest}
        for at in sorted(shown):
            row = (str(at + 1), f"{self.rates[at]:.2e}", f"{self.losses[at]:.5g}", f"{self.smoothed[at]:.5g}")
            table.add_row(*row, style="bold" if at == nearest else None)
        return table

    def picture(self, path: Path) -> None:
        """Draw losses against rates, and the suggestion."""
        figure = Figure(figsize=(6.2, 3.6), layout="constrained")
        axis = figure.subplots()
        axis.plot(self.rates, self.losses, color="#8a8a8a", linewidth=1.0, label="loss")
        axis.plot(self.rates, self.smoothed, color=COLOURS["generated"], linewidth=2.0, label="smoothed")
        axis.axvline(self.suggestion, color=COLOURS["baseline"], label=f"suggested: {self.suggestion:g}")
        axis.set_xscale("log")
        low, high = min(self.smoothed), max(self.smoothed[0], self.losses[0])
        axis.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
        axis.set_xlabel("learning rate", color=TEXT)
        axis.set_ylabel("loss", color=TEXT)
        axis.legend(frameon=False, fontsize=9)
        clean(axis)
        write_whole(path, png(figure))


def tune_learning_rate(
    config: Config,
    *,
    steps: int = 100,
    low: float = 1e-6,
    high: float = 1.0,
    told: Callable[[int, float, float], None] = lambda step, rate, loss: None,
) -> RangeTest:
    """Train a few steps with a rate that grows from ``low`` to ``high``, and suggest one. All ranks call it together.

    Parameters
    ----------
    config
        Configuration of the run. Its folder is not touched.
    steps
        Of the test.
    low, high
        First and last learning rate.
    told
        Called after each step with its number, rate and loss.

    Raises
    ------
    UserError
        If the configuration does not fit its store, or the loss falls nowhere.
    """
    if not 0 < low < high:
        raise UserError(f"--low {low:g} must be above 0 and below --high {high:g}.")
    if steps < LEAST_STEPS:
        raise UserError(f"--steps {steps}: a test takes {LEAST_STEPS} steps at least.")
    quiet = {"comms_log": False, "flops_profile": 0}
    config = config.model_copy(update={"train": config.train.model_copy(update=quiet)})
    world = check(config)
    stage = make_stage(config, open_data(config.data), world)
    settled, _ = settle(stage, config, world, begun=False)
    engine = Engine(stage.module, settled.train, world)
    engine.train()
    batches = stage.train_batches(0)
    rates = np.geomspace(low, high, steps).tolist()
    losses: list[float] = []
    try:
        for step, (rate, micro_batches) in enumerate(zip(rates, batches, strict=False)):
            seed_step(config.seed, step, world.rank)
            sums = StepLosses()
            for batch in micro_batches:
                found = engine.forward(engine.moved(batch))
                sums.add(found)
                engine.backward(found["loss"].float().mean())
            applied = engine.step(rate).applied
            sums.close(config.train.global_batch, rate, 0.0, applied)
            loss = sums.take()[0].losses["loss"]
            if not applied or not np.isfinite(loss) or _ended([*losses, loss]):
                break
            losses.append(loss)
            told(step + 1, rate, loss)
    finally:
        getattr(batches, "close", lambda: None)()  # what reads ahead
        engine.release()
    return judge(rates[: len(losses)], losses, whole=len(losses) == steps)


def _ended(losses: list[float]) -> bool:
    """Whether the last losses are above the first by as much as the lowest is below it."""
    if len(losses) < LEAST_STEPS:
        return False
    first, now, lowest = np.median(losses[:5]), np.median(losses[-3:]), min(losses)
    return bool(now > first + max(first - lowest, 0.1 * abs(first)))


def judge(rates: list[float], losses: list[float], *, whole: bool) -> RangeTest:
    """Return what losses at growing rates say; ``whole``: the test came to its last step.

    Raises
    ------
    UserError
        If the loss falls nowhere.
    """
    if len(losses) < LEAST_STEPS:
        raise UserError(
            f"The loss was no number, or far above the first, after {len(losses)} steps: begin with a lower --low, or "
            "take more --steps."
        )
    x, smoothed = np.log(rates), smooth(np.array(losses), max(1.0, len(losses) / WIDTH))
    lowest = int(smoothed.argmin())
    rises = None if whole and lowest == len(losses) - 1 else rates[lowest]
    limit = rates[-1] if rises is None else rises / BELOW
    slope = np.gradient(smoothed, x)
    slope[np.array(rates) > limit] = np.inf
    steepest = int(slope.argmin())
    if not slope[steepest] < 0:
        raise UserError(
            f"The loss falls nowhere between the rates {rates[0]:g} and {limit:g}: begin with a lower --low, or take "
            "more --steps."
        )
    return RangeTest(rates, losses, smoothed.tolist(), rises, float(f"{rates[steepest]:.1e}"))


def smooth(values: F64, deviation: float) -> F64:
    """Return a Gaussian-weighted mean of neighbours, by a standard deviation in places; ends weigh what there is."""
    place = np.arange(len(values))
    weight = np.exp(-0.5 * ((place[:, None] - place) / deviation) ** 2)
    smoothed: F64 = weight @ values / weight.sum(1)
    return smoothed

"""``bgen finetune --task time``: from the user's own time course to a model that interpolates and forecasts it.

The flow of a parent that was trained on trajectories over time is trained further; otherwise a small hybrid is trained
on the adapted autoencoder. The course of one experiment has only a handful of time points, so missing ones start from
displacement interpolation (``flow.source: neighbours``), and the network learns only what that misses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from bgen.config.data import TrajectoriesConfig
from bgen.config.finetune import FinetuneConfig
from bgen.config.flow import FlowConfig
from bgen.config.load import load_finetune
from bgen.config.train import TrainConfig
from bgen.distributed import world as ranks
from bgen.errors import UserError
from bgen.hub.about import About
from bgen.hub.directory import Module, SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.nn.lora import merge_lora
from bgen.order.keys import hash_keys
from bgen.tasks.columns import require_column, text_column
from bgen.tasks.finetune.flow import choose_trained
from bgen.tasks.finetune.request import WATCHED, Request, require_wide_layers
from bgen.tasks.finetune.task import Job, Task
from bgen.tasks.time.axis import trained_over_time
from bgen.train.stages.course_in_memory import CourseStage
from data_tools.check.quantities import read_quantities

LEAST_TIMES, LEAST_CELLS = 3, 10

COURSE = "finetune/course"
"""Configuration of a fine-tuning on a time course."""


@dataclass(frozen=True)
class Course:
    """The user's time course.

    Attributes
    ----------
    column
        obs column of the times.
    time
        ``[n_cells]``.
    system
        obs columns that name a trajectory.
    code
        Number of each cell's trajectory ``[n_cells]``.
    unit
        Unit of the times, if the data say it.
    read
        How times that are written as text were understood, as a sentence; "" for numbers.
    """

    column: str
    time: NDArray[np.float64]
    system: list[str]
    code: NDArray[np.int64]
    unit: str | None = None
    read: str = ""

    @property
    def times(self) -> NDArray[np.float64]:
        """Distinct times, ascending."""
        return np.unique(self.time)

    def split(self, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the cells to train on and those to watch: a ``share`` of every population of every trajectory."""
        population = pd.factorize(pd.MultiIndex.from_arrays([self.code, self.time]))[0]
        order = np.lexsort((hash_keys(seed, np.arange(len(population))), population))
        sizes = np.bincount(population)
        place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        watched = place < np.maximum(1, np.round(share * sizes)).astype(int)[population[order]]
        return np.sort(order[~watched]), np.sort(order[watched])


def read_course(adata: AnnData, column: str | None, system: list[str], unit: str | None = None) -> Course:
    """Read the times and trajectories of the user's cells.

    ``unit`` is the one that texts are read in ("day 3", "24h"); None: their own.

    Raises
    ------
    UserError
        If the column is not named or not there, is no number, or holds too few time points or cells.
    """
    if column is None:
        raise UserError("--task time needs --time: the obs column with the time of each cell.")
    require_column(adata, column)
    found = read_quantities(adata.obs[column], "time", unit)
    time = found.numbers
    if not np.isfinite(time).all():
        wrong = f" ({found.complaint()})" if found.wrong else ""
        raise UserError(
            f"obs['{column}'] holds no time for {int((~np.isfinite(time)).sum()):,} of {adata.n_obs:,} cells{wrong}:"
            " give each its time, as a number or as text such as '24h', 'day 3' or 'E8.5', or remove those cells."
        )
    labels = [text_column(adata, name) for name in system]
    code = pd.factorize(pd.MultiIndex.from_arrays(labels))[0] if labels else np.zeros(adata.n_obs, np.int64)
    declared = adata.uns.get("time_unit")
    said = found.sentence(column) if found.read else ""
    course = Course(
        column, time, system, code.astype(np.int64), found.unit or (str(declared) if declared else None), said
    )
    counts = pd.Series(time).value_counts().sort_index()
    if len(counts) < LEAST_TIMES:
        raise UserError(
            f"obs['{column}'] holds {len(counts)} time points; {LEAST_TIMES} at least are needed to learn from."
        )
    if (counts < LEAST_CELLS).all():
        raise UserError(
            f"No time of obs['{column}'] has {LEAST_CELLS} cells: round the times, so that each has a population."
        )
    return course


def course_shape(course: Course, batch: int) -> TrajectoriesConfig:
    """Choose trajectories for a course: three time points, and cells so that a batch of ``batch`` cells holds four."""
    typical = int(np.median(pd.Series(course.time).value_counts()))
    return TrajectoriesConfig(
        along="time", system=course.system, times=LEAST_TIMES, cells=max(8, min(batch // (4 * LEAST_TIMES), typical))
    )


def whole_trajectories(train: TrainConfig, shape: TrajectoriesConfig, world_size: int) -> TrainConfig:
    """Return the settings with a global batch and micro batches of whole trajectories, no larger than were asked for.

    The global batch holds one trajectory per rank at least.

    Raises
    ------
    UserError
        If not even one trajectory fits into a micro batch.
    """
    share = max(1, train.global_batch // (shape.size * world_size))
    micro: int | str | None = train.micro_batch
    if isinstance(train.micro_batch, int):
        if train.micro_batch < shape.size:
            raise UserError(
                f"train.micro_batch={train.micro_batch} holds no whole trajectory of {shape.times} time points x"
                f" {shape.cells} cells: give {shape.size} at least, or leave it out."
            )
        most = train.micro_batch // shape.size
        micro = shape.size * max(n for n in range(1, share + 1) if share % n == 0 and n <= most)
    return train.model_copy(update={"global_batch": share * shape.size * world_size, "micro_batch": micro})


def course_config(course: Course, overrides: Sequence[str]) -> FinetuneConfig:
    """Return the configuration of a fine-tuning on a course, whose typical gap is the unit of the flow's time."""
    return load_finetune(COURSE, [_scale(float(np.median(np.diff(course.times)))), *overrides])


def course_flow(gap: float, *, forecast: bool) -> FlowConfig:
    """Return the settings of a new flow for a course with few time points.

    Parameters
    ----------
    gap
        Typical gap in time.
    forecast
        Train every third trajectory to forecast, the others to interpolate; False: all to interpolate.
    """
    return load_finetune(COURSE, [_scale(gap), *([] if forecast else ["flow.patterns.forecast=0"])]).flow


def _scale(gap: float) -> str:
    return f"flow.backbone.time.scale={gap}"


def about_course(about: About, course: Course, shape: TrajectoriesConfig) -> About:
    """Return what the model directory says, and what it says of time."""
    said: dict[str, Any] = {
        "trajectories": shape,
        "times": [float(time) for time in course.times],
        "roles": {**about.roles, "time": course.column},
        **({"units": {"time": course.unit}} if course.unit else {}),
    }
    return about.model_copy(update=said)


class Time(Task[Course]):
    """The user's own time course; prepared are its times and trajectories."""

    def check(self, parent: SavedModel, adata: AnnData, request: Request) -> None:
        """See :class:`Task`."""
        require_wide_layers(parent, request)
        for name in request.system:
            require_column(adata, name)
        self.prepare(parent, adata, request)

    def understood(self, adata: AnnData, request: Request) -> list[str]:
        """See :class:`Task`."""
        said = read_course(adata, request.time, list(request.system)).read
        return [said] if said else []

    def configure(self, adata: AnnData, request: Request, overrides: Sequence[str]) -> FinetuneConfig:
        """See :class:`Task`; the typical gap of the course is the unit of the flow's time."""
        return course_config(read_course(adata, request.time, list(request.system)), overrides)

    def prepare(self, grown: SavedModel, adata: AnnData, request: Request) -> Course:
        """See :class:`Task`; times of a parent's own column are read in its unit."""
        goes_on = trained_over_time(grown) and grown.about.roles.get("time") == request.time
        unit = grown.about.units.get("time") if goes_on else None
        return read_course(adata, request.time, list(request.system), unit)

    def train(self, job: Job, prepared: Course) -> tuple[Module, About]:
        """Train the flow over time: the parent's, if it has one of the same column, else a new one."""
        world, grown, config, course = ranks.current(), job.grown, job.settings("flow", "flow"), prepared
        if trained_over_time(grown) and grown.about.roles.get("time") == course.column:
            assert isinstance(grown.module, LatentFlow), "only flows are trained over time"
            flow = grown.module
            choose_trained(flow, job.request.mode)
            assert grown.about.trajectories is not None, "it was trained on them"
            shape = grown.about.trajectories.model_copy(update={"system": course.system})
        else:
            job.runs.say("The model has no flow over this time: a new one is trained on the autoencoder.")
            flow = LatentFlow(config.flow, grown.codec, {}, {})  # told nothing but the populations
            shape = course_shape(course, config.train.global_batch)
        stage = CourseStage(
            config.model_copy(update={"train": whole_trajectories(config.train, shape, world.size)}),
            flow,
            job.memory,
            shape,
            course.code,
            course.time,
            *course.split(WATCHED, config.seed),
            world,
            job.runs.fingerprint(grown),
        )
        job.runs.fit(stage.config, stage)
        merge_lora(flow.backbone)
        return flow, about_course(job.about, course, shape)

"""The verbs of a loaded model that make cells: generate, interpolate, forecast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

from anndata import AnnData

from bgen.evaluate.protocols.time_point import TimeScores
from bgen.progress import Progress
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.generate import read_moments, sample_settings
from bgen.tasks.time.axis import TimeAxis
from bgen.tasks.time.observed import observe
from bgen.tasks.time.predict import predict_times
from bgen.tasks.time.trajectories import generate_as_trained
from bgen.tasks.user_cells import Cells, Reading, UserCells


class TimeOptions(Reading, total=False):
    """Keyword arguments that ``interpolate`` and ``forecast`` share; see :meth:`GeneratorVerbs.interpolate`."""

    n: int | None
    where: Mapping[str, Any] | None
    library_size: float | None
    sample: Mapping[str, Any] | None
    time_column: str | None
    seed: int
    progress: Progress | None


class GeneratorVerbs(AnnDataModel):
    """What a flow makes: cells of any kind that training had, and cells of times that were not measured."""

    def generate(
        self,
        n: int = 1000,
        *,
        where: Mapping[str, Any] | None = None,
        library_size: float | None = None,
        times: Sequence[float] | Literal["all"] | None = None,
        guidance: float | None = None,
        guidance_of: Mapping[str, float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        steps: int | None = None,
        solver: str | None = None,
        noise: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> AnnData:
        """Generate new cells.

        Parameters
        ----------
        n
            Number of cells; of a course, at each time.
        where
            Condition to value, ``{"cell_type": "B"}``; ``model.conditions`` lists them. The rest is drawn from the
            training cells that agree.
        library_size
            Expected total counts of every cell; None: generated with the cell.
        times
            Of a model of courses: the times of a whole course ("all" or None: those of the training cells).
        guidance, guidance_of, guidance_interval
            How much conditions are stressed (1: as trained): all of them, single ones by name, and within which part
            of the way from noise (1) to cells (0).
        steps, solver, noise
            Of the solver; "euler", "heun", "midpoint" or "adaptive"; and the spread of the noise at its start.
            Default: the model's.
        seed
            The same seed gives the same cells.

        Returns
        -------
        AnnData
            Integer counts (CSR float32) of the model's genes, and the conditions in obs. ``uns["bgen"]`` says by which
            model and settings they were made, and what of the question training has not seen.

        Raises
        ------
        UserError
            If the model generates no cells, or a condition, value, time or number cannot be meant.

        Examples
        --------
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model")  # which `bgen demo` makes
        >>> cells = model.generate(50, where={"cell_type": "B"}, seed=0)
        >>> cells.n_obs, cells.obs["cell_type"].unique().tolist()
        (50, ['B'])
        """
        settings = sample_settings(
            self.saved.sample,
            guidance=guidance,
            guidance_of=self._by_column(guidance_of),
            guidance_interval=guidance_interval,
            steps=steps,
            solver=solver,
            noise=noise,
        )
        return generate_as_trained(
            self.saved,
            n,
            times=times,
            where=where or {},
            library_size=library_size,
            settings=settings,
            seed=seed,
            progress=progress,
        )

    def interpolate(
        self, data: Cells | UserCells, times: float | Sequence[float], **options: Unpack[TimeOptions]
    ) -> AnnData:
        """Generate cells of times that the data lacks, from the cells before and after.

        Cells that the data does hold of such a time are not shown to the model; they are what its cells are compared
        with.

        Parameters
        ----------
        data
            Cells with a time in obs: a file, a store, AnnData in memory, or what :meth:`read` gave.
        times
            One time or several, in the model's unit.
        n
            Cells of each time; default: as many as the data holds, else the mean of the times around.
        where
            Condition to value: only cells that agree are looked at, and such cells are generated.
        library_size
            Expected total counts of every cell; default: generated with the cell.
        sample
            Settings of the solver, such as ``{"steps": 4}``.
        time_column
            obs column of the times; default: the model's name of it, or "time".
        seed
            The same seed gives the same cells.
        counts, gene_column, floor, layer, access
            How cells are read: see :meth:`read`.

        Returns
        -------
        AnnData
            Integer counts (CSR float32) of the model's genes, with the time and conditions in obs;
            ``uns["bgen"]["scores"]`` has the scores beside baselines and real cells where the data holds that time.

        Raises
        ------
        UserError
            If the model knows no courses, or data, times or conditions do not fit it.

        Examples
        --------
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model").finetune(  # `bgen demo` makes model and cells
        ...     "bgen-demo/cells.h5ad", "course", task="time", time="time", within=["donor"], mode="head",
        ...     overrides=["train.steps=5", "track.mlflow=false", "track.progress=false"],  # few steps: an example
        ...     say=lambda sentence: None,
        ... )
        >>> cells = model.interpolate("bgen-demo/cells.h5ad", 24.0, n=60, seed=0)
        >>> cells.n_obs, cells.obs["time"].unique().tolist()
        (60, [24.0])
        """
        return self.predict_times(data, times, forecast=False, **options)[0]

    def forecast(
        self, data: Cells | UserCells, times: float | Sequence[float], **options: Unpack[TimeOptions]
    ) -> AnnData:
        """Generate cells of later times, from the cells before them alone.

        Parameters
        ----------
        data, times, options
            As for :meth:`interpolate`, and so is what is returned and raised.

        Examples
        --------
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model").finetune(  # `bgen demo` makes model and cells
        ...     "bgen-demo/cells.h5ad", "course", task="time", time="time", within=["donor"], mode="head",
        ...     overrides=["train.steps=5", "track.mlflow=false", "track.progress=false"],  # few steps: an example
        ...     say=lambda sentence: None,
        ... )
        >>> cells = model.forecast("bgen-demo/cells.h5ad", 48.0, n=60, seed=0)
        >>> cells.n_obs, cells.obs["time"].unique().tolist()
        (60, [48.0])
        """
        return self.predict_times(data, times, forecast=True, **options)[0]

    def predict_times(
        self,
        data: Cells | UserCells,
        times: float | Sequence[float],
        *,
        forecast: bool,
        n: int | None = None,
        where: Mapping[str, Any] | None = None,
        library_size: float | None = None,
        sample: Mapping[str, Any] | None = None,
        time_column: str | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        **reading: Unpack[Reading],
    ) -> tuple[AnnData, dict[float, TimeScores]]:
        """Interpolate or forecast, and return the scores of each time that the data holds as well.

        Parameters
        ----------
        forecast
            From earlier times alone; otherwise from both sides.
        data, times, n, where, library_size, sample, time_column, seed, reading
            As for :meth:`interpolate`, and so is what is raised.

        Examples
        --------
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model").finetune(  # `bgen demo` makes model and cells
        ...     "bgen-demo/cells.h5ad", "course", task="time", time="time", within=["donor"], mode="head",
        ...     overrides=["train.steps=5", "track.mlflow=false", "track.progress=false"],  # few steps: an example
        ...     say=lambda sentence: None,
        ... )
        >>> cells, scores = model.predict_times("bgen-demo/cells.h5ad", 24.0, forecast=False, seed=0)
        >>> list(scores)
        [24.0]
        """
        TimeAxis.of(self.saved)  # before anything is read
        wanted = read_moments(times).tolist()
        asked = where or {}
        given = dict(sample or {})
        given |= {"guidance_of": self._by_column(given.get("guidance_of"))}
        settings = sample_settings(self.saved.sample, **given)
        return predict_times(
            self.saved,
            observe(self, self.read(data, **reading), asked, time_column),
            wanted,
            forecast=forecast,
            where=asked,
            n=n,
            library_size=library_size,
            settings=settings,
            seed=seed,
            progress=progress,
        )

    def _by_column(self, scales: Mapping[str, float] | None) -> dict[str, float] | None:
        """Return scales of guidance by column, given by column or role."""
        return None if scales is None else {self.saved.column_name(name): value for name, value in scales.items()}

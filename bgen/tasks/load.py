"""What a user holds: an exported model with all its verbs, AnnData in and AnnData out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from anndata import AnnData

from bgen.evaluate.protocols.time_point import TimeScores
from bgen.hub.directory import load_directory
from bgen.progress import Progress
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.cells.annotate import annotate_cells
from bgen.tasks.cells.denoise import denoise_cells
from bgen.tasks.cells.integrate import integrate_cells
from bgen.tasks.generate import sample_settings
from bgen.tasks.perturb.perturb import perturb_cells
from bgen.tasks.time.axis import TimeAxis
from bgen.tasks.time.observed import Observed, Systems, read_times, select_cells
from bgen.tasks.time.predict import predict_times
from bgen.tasks.time.trajectories import generate_as_trained


class Model(AnnDataModel):
    """An exported model, loaded, with a method for each verb of the command line."""

    def generate(
        self,
        n: int = 1000,
        *,
        where: Mapping[str, Any] | None = None,
        library_size: float | None = None,
        times: Sequence[float] | Literal["all"] | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        steps: int | None = None,
        solver: str | None = None,
        noise: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> AnnData:
        """Generate cells; see :func:`bgen.tasks.generate.generate_cells`.

        With ``times`` ("all": those of the training cells), whole trajectories with n cells at each time point; see
        :func:`bgen.tasks.time.trajectories.generate_trajectories`. A model trained on trajectories takes all times
        unless others are given.
        """
        settings = sample_settings(
            self.saved.sample,
            guidance=guidance,
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
        self,
        adata: AnnData,
        times: float | Sequence[float],
        *,
        n: int | None = None,
        where: Mapping[str, Any] | None = None,
        library_size: float | None = None,
        sample: Mapping[str, Any] | None = None,
        time_column: str | None = None,
        layer: str | None = None,
        seed: int = 0,
    ) -> AnnData:
        """Generate cells at time points that the data lack, from the time points around; AnnData of integer counts.

        See :meth:`predict_times`.
        """
        return self.predict_times(
            adata,
            times,
            forecast=False,
            n=n,
            where=where,
            library_size=library_size,
            sample=sample,
            time_column=time_column,
            layer=layer,
            seed=seed,
        )[0]

    def forecast(
        self,
        adata: AnnData,
        times: float | Sequence[float],
        *,
        n: int | None = None,
        where: Mapping[str, Any] | None = None,
        library_size: float | None = None,
        sample: Mapping[str, Any] | None = None,
        time_column: str | None = None,
        layer: str | None = None,
        seed: int = 0,
    ) -> AnnData:
        """Generate cells at later time points from the data before them; otherwise as :meth:`interpolate`."""
        return self.predict_times(
            adata,
            times,
            forecast=True,
            n=n,
            where=where,
            library_size=library_size,
            sample=sample,
            time_column=time_column,
            layer=layer,
            seed=seed,
        )[0]

    def predict_times(
        self,
        adata: AnnData,
        times: float | Sequence[float],
        *,
        forecast: bool,
        n: int | None = None,
        where: Mapping[str, Any] | None = None,
        library_size: float | None = None,
        sample: Mapping[str, Any] | None = None,
        time_column: str | None = None,
        layer: str | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> tuple[AnnData, dict[float, TimeScores]]:
        """Generate cells at times that are treated as missing from the data, and score them where they are not.

        Parameters
        ----------
        adata
            Raw counts in X (or ``layer``) and a time for every cell in obs; genes are matched by id.
        times
            Times asked for, in the model's unit. Cells that the data hold there are not shown to the model; they are
            what it is compared with (also in ``uns['bgen']['scores']`` of the result).
        forecast
            From earlier time points alone; otherwise from both sides.
        n
            Cells per time; None: as many as the data hold there, else the mean of the neighbours.
        where
            Condition to value: only cells that agree are looked at, and such cells are generated.
        library_size
            Expected total counts of every cell; None: generated.
        sample
            Overrides of the model's :class:`bgen.config.flow.SampleConfig`, such as ``{"steps": 4}``.
        time_column
            obs column of the times; None: the model's name of it, or "time".

        Raises
        ------
        UserError
            If the model knows no trajectories, or data, times or conditions do not fit it.
        """
        axis = TimeAxis.of(self.saved)
        wanted = [float(times)] if isinstance(times, int | float) else [float(time) for time in times]
        asked = where or {}
        settings = sample_settings(self.saved.sample, **(sample or {}))
        adata = select_cells(self.saved, adata, asked)
        mean, variance = self.encode(adata, layer=layer)
        known = [c for c in self.saved.columns if c != axis.column]
        observed = Observed(
            counts=self.counts(adata, layer),
            mean=mean,
            variance=variance,
            time=read_times(adata, axis, time_column),
            columns={name: values for name in known if (values := self._column(adata, name)) is not None},
            systems=Systems.of(adata, axis.system),
        )
        return predict_times(
            self.saved,
            observed,
            wanted,
            forecast=forecast,
            where=asked,
            n=n,
            library_size=library_size,
            settings=settings,
            seed=seed,
            progress=progress,
        )

    def embed(self, adata: AnnData, *, layer: str | None = None) -> AnnData:
        """Return a copy of the data with the latent means of its cells in ``obsm['X_bgen']`` ``[n_cells, D]``."""
        mean, _ = self.encode(adata, layer=layer)
        embedded = adata.copy()
        embedded.obsm["X_bgen"] = mean
        embedded.uns["bgen"] = {**dict(adata.uns.get("bgen", {})), "embedding_model": self.saved.fingerprint()}
        return embedded

    def annotate(
        self, adata: AnnData, label: str | None = None, *, layer: str | None = None, threshold: float = 0.5
    ) -> AnnData:
        """Label cells, with probabilities; see :func:`bgen.tasks.cells.annotate.annotate_cells`."""
        return annotate_cells(self, adata, label, layer=layer, threshold=threshold)

    def denoise(self, adata: AnnData, *, layer: str | None = None, library_size: float | None = None) -> AnnData:
        """Add expected counts as a layer; see :func:`bgen.tasks.cells.denoise.denoise_cells`."""
        return denoise_cells(self, adata, layer=layer, library_size=library_size)

    def integrate(
        self,
        adata: AnnData,
        *,
        reference: str | None = None,
        batch: str | None = None,
        label: str | None = None,
        layer: str | None = None,
    ) -> AnnData:
        """Add a latent and counts without batch effects; see :func:`bgen.tasks.cells.integrate.integrate_cells`."""
        return integrate_cells(self, adata, reference=reference, batch=batch, label=label, layer=layer)

    def perturb(
        self,
        adata: AnnData,
        perturbation: str,
        *,
        control: tuple[str, str] | None = None,
        dose: float | None = None,
        n: int | None = None,
        layer: str | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> AnnData:
        """Predict perturbed cells from control cells; see :func:`bgen.tasks.perturb.perturb.perturb_cells`."""
        return perturb_cells(
            self, adata, perturbation, control=control, dose=dose, n=n, layer=layer, seed=seed, progress=progress
        )


def load_model(folder: str | Path, device: str = "cpu") -> Model:
    """Load an exported model directory.

    Raises
    ------
    UserError
        If it is not one, is incomplete or damaged, or comes from a newer bgen.
    """
    return Model(load_directory(folder, device))

"""What a user holds: an exported model with its verbs, AnnData in and AnnData out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from bgen.config.errors import UserError, nearest
from bgen.data.batch import CellBatch
from bgen.data.genes import match_genes
from bgen.data.keys import hash_keys
from bgen.evaluate.time_point import TimeScores
from bgen.hub.directory import SavedModel, load_directory
from bgen.models.latent_flow import LatentFlow
from bgen.tasks.annotate import annotate_cells
from bgen.tasks.denoise import denoise_cells
from bgen.tasks.generate import Progress, generate_cells, sample_settings
from bgen.tasks.integrate import integrate_cells
from bgen.tasks.perturb import perturb_cells
from bgen.tasks.time import Observed, Systems, predict_times, read_times, select_cells
from bgen.tasks.trajectories import TimeAxis, generate_trajectories, trained_over_time

BATCH = 1024


class Model:
    """An exported model, loaded.

    Attributes
    ----------
    saved
        The network with its gene table, columns and provenance.
    """

    def __init__(self, saved: SavedModel) -> None:
        self.saved = saved

    def __repr__(self) -> str:
        saved = self.saved
        return f"<bgen {saved.kind} '{saved.about.get('name')}': {len(self.genes):,} genes>"

    @property
    def genes(self) -> list[str]:
        """Gene ids in the model's order."""
        return self.saved.genes["id"].tolist()

    @property
    def conditions(self) -> dict[str, Any]:
        """What :meth:`generate` can be asked for: column to its categories, or to "number"."""
        module = self.saved.module
        names = module.conditions.names if isinstance(module, LatentFlow) else []
        known = self.saved.columns
        return {name: known[name].categories if known[name].kind == "category" else "number" for name in names}

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
        :func:`bgen.tasks.trajectories.generate_trajectories`. A model trained on trajectories takes all times unless
        others are given.
        """
        settings = sample_settings(
            self.saved.sample,
            guidance=guidance,
            guidance_interval=guidance_interval,
            steps=steps,
            solver=solver,
            noise=noise,
        )
        if times is None and not trained_over_time(self.saved):
            return generate_cells(
                self.saved,
                n,
                where=where or {},
                library_size=library_size,
                settings=settings,
                seed=seed,
                progress=progress,
            )
        return generate_trajectories(
            self.saved,
            n,
            times=None if times is None or times == "all" else times,
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
            Overrides of the model's :class:`bgen.config.schema.SampleConfig`, such as ``{"steps": 4}``.
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
        """Label cells, with probabilities; see :func:`bgen.tasks.annotate.annotate_cells`."""
        return annotate_cells(self, adata, label, layer=layer, threshold=threshold)

    def denoise(self, adata: AnnData, *, layer: str | None = None, library_size: float | None = None) -> AnnData:
        """Add expected counts as a layer; see :func:`bgen.tasks.denoise.denoise_cells`."""
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
        """Add a latent and counts without batch effects; see :func:`bgen.tasks.integrate.integrate_cells`."""
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
        """Predict perturbed cells from control cells; see :func:`bgen.tasks.perturb.perturb_cells`."""
        return perturb_cells(
            self, adata, perturbation, control=control, dose=dose, n=n, layer=layer, seed=seed, progress=progress
        )

    @torch.no_grad()
    def encode(self, adata: AnnData, *, layer: str | None = None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mean and variance ``[n_cells, D]`` of the cells' latent states.

        Parameters
        ----------
        adata
            Raw counts in X (or ``layer``); genes are matched by id, missing ones count as zero. Covariates are taken
            from obs where the column is there, else they are unknown.

        Raises
        ------
        UserError
            If too few genes agree, or the matrix holds no counts.
        """
        counts = self.counts(adata, layer)
        obs = self.covariates(adata)
        means, variances = [], []
        for start in range(0, counts.shape[0], BATCH):
            batch = _batch(counts[start : start + BATCH], {k: v[start : start + BATCH] for k, v in obs.items()}, start)
            mean, logvar = self.saved.vae.encode(batch)
            means.append(mean.numpy())
            variances.append(logvar.exp().numpy())
        return np.concatenate(means), np.concatenate(variances)

    def decode(
        self,
        z: NDArray[np.float32],
        library_size: NDArray[np.float32],
        covariates: Mapping[str, Sequence[str]] | None = None,
    ) -> NDArray[np.float32]:
        """Return expected counts ``[n, G]`` for latent states ``z [n, D]`` and total counts ``library_size [n]``.

        ``covariates`` are category names per cell; a covariate that is not given is unknown to the decoder.
        """
        codes = {name: self._codes(name, np.asarray(values)) for name, values in (covariates or {}).items()}
        return self.decode_codes(z, library_size, codes)

    @torch.no_grad()
    def decode_codes(
        self, z: NDArray[np.float32], library_size: NDArray[np.float32], covariates: Mapping[str, NDArray[np.int64]]
    ) -> NDArray[np.float32]:
        """Return the same for covariates by code, as :meth:`covariates` gives them."""
        expected = []
        for start in range(0, len(z), BATCH):
            part = slice(start, start + BATCH)
            codes = {name: torch.from_numpy(column[part]) for name, column in covariates.items()}
            state, size = torch.from_numpy(z[part]), torch.from_numpy(library_size[part])
            expected.append(self.saved.vae.decode(state, size, codes).mean.numpy())
        return np.concatenate(expected)

    def counts(self, adata: AnnData, layer: str | None = None) -> sp.csr_matrix:
        """Return the model's genes of the data as CSR ``[n_cells, G]``.

        Raises
        ------
        UserError
            As :meth:`encode`, or if the layer is not there.
        """
        if layer is not None and layer not in adata.layers:
            raise UserError(f"The data has no layer '{layer}'.{nearest(layer, filter(None, adata.layers))}")
        places = match_genes(self.genes, adata.var_names.astype(str).tolist(), what="the data")
        matrix = sp.csr_matrix(adata.X if layer is None else adata.layers[layer])
        if matrix.nnz and (matrix.data.min() < 0 or not np.array_equal(matrix.data, np.rint(matrix.data))):
            where = "X" if layer is None else f"layers['{layer}']"
            raise UserError(
                f"{where} is not counts: it holds negative or fractional values. Give the layer with the raw counts;"
                " `bgen data check` says where they are."
            )
        columns = np.full(adata.n_vars, -1)
        columns[places[places >= 0]] = np.flatnonzero(places >= 0)
        kept = columns[matrix.indices] >= 0
        indptr = np.concatenate([[0], np.cumsum(kept)])[matrix.indptr]
        counts = sp.csr_matrix(
            (matrix.data[kept].astype(np.float32), columns[matrix.indices[kept]], indptr),
            shape=(adata.n_obs, len(self.genes)),
        )
        counts.sort_indices()
        counts.eliminate_zeros()
        return counts

    def covariates(self, adata: AnnData) -> dict[str, NDArray[np.int64]]:
        """Return codes ``[n_cells]`` of the model's covariates; -1 where the data does not tell or it is new."""
        codes = {}
        for name in self.saved.vae.covariates:
            found = self._column(adata, name)
            codes[name] = np.full(adata.n_obs, -1) if found is None else found
        return codes

    def _column(self, adata: AnnData, name: str) -> NDArray[Any] | None:
        """Return a column that the model knows as codes or float32 numbers; None if the data lack it."""
        info = self.saved.columns[name]
        there = next((c for c in (name, info.role) if c in adata.obs), None)
        if there is None:
            return None
        if info.kind == "category":
            return self._codes(name, adata.obs[there].astype(str).to_numpy())
        return adata.obs[there].to_numpy(np.float32)

    def _codes(self, name: str, values: NDArray[Any]) -> NDArray[np.int64]:
        """Return the codes of category names; one that the model does not know is unknown, -1."""
        codes = {category: code for code, category in enumerate(self.saved.columns[name].categories)}
        return np.array([codes.get(str(value), -1) for value in values], dtype=np.int64)


def load_model(folder: str | Path, device: str = "cpu") -> Model:
    """Load an exported model directory.

    Raises
    ------
    UserError
        If it is not one, is incomplete or damaged, or comes from a newer bgen.
    """
    return Model(load_directory(folder, device))


def parse_where(texts: Sequence[str]) -> dict[str, str]:
    """Read conditions ``column=value``."""
    where = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise UserError(f"'{text}' is not a condition: write column=value, such as cell_type=B.")
        where[name.strip()] = value.strip()
    return where


def parse_times(text: str | None) -> list[float] | Literal["all"] | None:
    """Read time points: numbers with commas between, or "all"."""
    if text is None or text == "all":
        return "all" if text else None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--times {text}: write numbers with commas between, such as 0,24,48, or all.") from None


def _batch(counts: sp.csr_matrix, obs: Mapping[str, NDArray[np.int64]], first: int) -> CellBatch:
    cells = np.arange(first, first + counts.shape[0])
    columns: dict[str, Tensor] = {name: torch.from_numpy(codes) for name, codes in obs.items()}
    return CellBatch(
        indptr=torch.from_numpy(counts.indptr.astype(np.int64)),
        indices=torch.from_numpy(counts.indices.astype(np.int32)),
        counts=torch.from_numpy(counts.data),
        n_genes=counts.shape[1],
        keys=torch.from_numpy(hash_keys(0, cells).view(np.int64)),
        cells=torch.from_numpy(cells),
        obs=columns,
    )

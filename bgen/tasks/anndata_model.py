"""The ground floor of all verbs: an exported model that encodes AnnData and decodes latent states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.errors import UserError, nearest
from bgen.genes.table import match_genes
from bgen.hub.directory import SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.order.keys import hash_keys

BATCH = 1024


class AnnDataModel:
    """An exported model: its genes, and the way from counts to latent states and back.

    Attributes
    ----------
    saved
        The network with its gene table, columns and provenance.
    """

    def __init__(self, saved: SavedModel) -> None:
        self.saved = saved

    def __repr__(self) -> str:
        saved = self.saved
        return f"<bgen {saved.kind} '{saved.about.name}': {len(self.genes):,} genes>"

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

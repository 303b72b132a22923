"""The base of all verbs: an exported model that reads and encodes cells, and decodes latent states.

Axes: N cells, G genes of the model, D latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.genes.table import VECTOR, known_by_vector
from bgen.hub.directory import SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.order.keys import hash_keys
from bgen.tasks.batches import LEAST, Batches, filled_up
from bgen.tasks.user_cells import Cells, Reading, UserCells, UserData, read_user_data

BATCH = 1024
"""Cells that are encoded or decoded at a time, at most on a CPU."""


class AnnDataModel:
    """An exported model: its genes, and the way from counts to latent states and back.

    Attributes
    ----------
    saved
        The network with its gene table, columns and provenance.
    """

    def __init__(self, saved: SavedModel) -> None:
        self.saved = saved

    @property
    def device(self) -> torch.device:
        """Where the network runs. What a method returns is in the CPU's memory, wherever that is."""
        return self.saved.device

    def __repr__(self) -> str:
        saved = self.saved
        return f"<bgen {saved.kind} '{saved.about.name}': {len(self.genes):,} genes>"

    @property
    def genes(self) -> list[str]:
        """Gene ids in the model's order."""
        return self.saved.genes["id"].tolist()

    @property
    def conditions(self) -> dict[str, Any]:
        """What cells can be asked for, by column: its categories, or "number"."""
        module = self.saved.module
        names = module.conditions.names if isinstance(module, LatentFlow) else []
        known = self.saved.columns
        return {name: known[name].categories if known[name].kind == "category" else "number" for name in names}

    def read(self, data: Cells | UserData | UserCells, **reading: Unpack[Reading]) -> UserCells:
        """Read cells and match them to this model. Every verb does this first, or takes the result in place of the
        data.

        Parameters
        ----------
        data
            A file or folder of any format that ``bgen data check`` reads, a store, or AnnData in memory. Genes are
            matched by id or, where a model has both, by symbol; those that the data lacks count as zero. Columns are
            found in obs by the model's name of them or by their role.
        counts
            Matrix of raw counts: "X" (the default), "raw/X", "layers/NAME", or "auto" for the first that is counts.
        layer
            ``layer="NAME"`` is ``counts="layers/NAME"``.
        gene_column
            Column of var with the gene ids; default: its index.
        floor
            Least share of the molecules of an average cell of the model that must be of genes that the data has;
            default 0.8.
        access
            How an address is read (:class:`bgen.config.data.Access`).

        Returns
        -------
        UserCells
            Its ``matched`` says what was matched and what was not; ``matched.sentences()`` in words.

        Raises
        ------
        UserError
            If too few genes agree, or the matrix holds no counts.

        Examples
        --------
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model")  # `bgen demo` makes it, and the cells
        >>> cells = model.read("bgen-demo/cells.h5ad", counts="auto")
        >>> cells.matched.matrix, cells.matched.missing
        ('X', [])
        >>> model.embed(cells).n_obs == model.denoise(cells).n_obs == len(cells)
        True
        """
        if isinstance(data, UserCells):
            if reading:
                raise UserError(
                    f"These cells are read already: {', '.join(reading)} has to be given when they are read."
                )
            if data.genes != self.genes:
                raise UserError("These cells were read for a model with other genes. Read them with this model.")
            return data
        saved = self.saved
        return read_user_data(data, **reading).match(
            saved.genes, saved.columns, self.expected_shares(), saved.about.units
        )

    @torch.no_grad()
    def expected_shares(self) -> NDArray[np.float32]:
        """Return the share of each gene ``[G]`` in the counts of the model's average cell."""
        codec = self.saved.codec
        average = codec.latent_mean[None, :-1].to(torch.float32)
        mean = codec.decode(average, torch.ones(1, device=self.device), {}).mean[0]
        return (mean / mean.sum()).cpu().numpy()

    def encode(
        self, data: Cells | UserCells, **reading: Unpack[Reading]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mean and variance ``[N, D]`` of the cells' latent states; see :meth:`read`.

        Covariates are taken from obs where the column is there, else they are unknown.
        """
        cells = self.read(data, **reading)
        obs = self.covariates(cells)

        def some(start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            part = filled_up(start, stop) if (stop - start) % LEAST else slice(start, stop)
            batch = cell_batch(cells.counts[part], {name: codes[part] for name, codes in obs.items()}, start)
            mean, variance = encode_batch(self.saved, batch)
            return mean[: stop - start], variance[: stop - start]

        means, variances = zip(*Batches(self.device, BATCH).over(len(cells), some), strict=True)
        return np.concatenate(means), np.concatenate(variances)

    def whiten(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return latent means ``[N, D]`` standardised by the training cells."""
        vae = self.saved.vae
        mean, std = (of[:-1].cpu().numpy() for of in (vae.latent_mean, vae.latent_std))
        whitened: NDArray[np.float32] = (latents - mean) / std
        return whitened

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
        size, wanted = self.saved.codec.size - 1, np.shape(z)[:1]
        if np.ndim(z) != 2 or np.shape(z)[1] != size or np.shape(library_size) != wanted:
            raise UserError(
                f"Latent states are [n, {size}] and library sizes [n], not {np.shape(z)} and {np.shape(library_size)}."
            )
        if any(codes_of.shape != wanted for codes_of in codes.values()):
            raise UserError(f"Covariates have a category for each of the {len(z)} cells.")
        return self.decode_codes(z, library_size, codes)

    def decode_codes(
        self, z: NDArray[np.float32], library_size: NDArray[np.float32], covariates: Mapping[str, NDArray[np.int64]]
    ) -> NDArray[np.float32]:
        """Return the same for covariates by code, as :meth:`covariates` gives them."""

        def some(start: int, stop: int) -> NDArray[np.float32]:
            part = filled_up(start, stop)
            codes = {name: column[part] for name, column in covariates.items()}
            return decode_batch(self.saved, z[part], library_size[part], codes)[: stop - start]

        return np.concatenate(list(Batches(self.device, BATCH, dense=4 * len(self.genes)).over(len(z), some)))

    def counts(self, data: Cells | UserCells, layer: str | None = None) -> sp.csr_matrix:
        """Return the model's genes of the data as CSR ``[N, G]``; see :meth:`read`."""
        return (self.read(data) if layer is None else self.read(data, layer=layer)).counts

    def covariates(self, data: Cells | UserCells) -> dict[str, NDArray[np.int64]]:
        """Return codes ``[N]`` of the model's covariates; -1 where the data does not tell or it is new."""
        cells = self.read(data)
        return {name: cells.columns.get(name, np.full(len(cells), -1)) for name in self.saved.codec.covariates}

    def mark_added_genes(self, adata: AnnData, cells: UserCells) -> None:
        """Say in ``var['bgen_source']`` of a copy of the cells which genes the model knows by their vectors alone.

        Nothing is added if it knows none so.
        """
        by_vector = known_by_vector(self.saved.genes)
        if by_vector.any():
            there = (cells.of_var >= 0) & by_vector[cells.of_var]
            adata.var["bgen_source"] = np.where(there, VECTOR, "")

    def _codes(self, name: str, values: NDArray[Any]) -> NDArray[np.int64]:
        """Return the codes of category names; one that the model does not know is unknown, -1."""
        codes = {category: code for code, category in enumerate(self.saved.columns[name].categories)}
        return np.array([codes.get(str(value), -1) for value in values], dtype=np.int64)


@torch.no_grad()
def encode_batch(saved: SavedModel, batch: CellBatch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and variance ``[B, D]`` of the latent states of cells, which may lie on the CPU.

    Raises
    ------
    UserError
        If they are not finite.
    """
    with saved.computing():
        mean, logvar = saved.codec.encode(batch.to(saved.device))
    found = mean.cpu().numpy(), logvar.exp().cpu().numpy()
    if not all(np.isfinite(values).all() for values in found):
        raise UserError("The model gives latent states that are not finite: its weights are damaged.")
    return found


@torch.no_grad()
def decode_batch(
    saved: SavedModel,
    z: NDArray[np.float32],
    library_size: NDArray[np.float32],
    covariates: Mapping[str, NDArray[np.int64]],
) -> NDArray[np.float32]:
    """Return expected counts ``[B, G]`` of cells with states ``z [B, D]`` and covariates by code ``[B]``."""
    codes = {name: torch.from_numpy(column).to(saved.device) for name, column in covariates.items()}
    state, size = (torch.from_numpy(of).to(saved.device) for of in (z, library_size))
    return saved.codec.decode(state, size, codes).mean.cpu().numpy()


def cell_batch(counts: sp.csr_matrix, obs: Mapping[str, NDArray[np.int64]], first: int) -> CellBatch:
    """Return cells in memory as a batch: counts ``[B, G]``, codes by column ``[B]``, the number of the first cell."""
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

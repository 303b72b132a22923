"""The verbs of a loaded model that add something to a user's cells: embed, annotate, denoise, integrate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from anndata import AnnData

from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.cells.annotate import annotate_cells
from bgen.tasks.cells.denoise import denoise_cells
from bgen.tasks.cells.embed import embed_cells
from bgen.tasks.cells.integrate import integrate_cells
from bgen.tasks.user_cells import Cells, Reading, UserCells


class CellVerbs(AnnDataModel):
    """What a model with a latent space adds to cells. Each returns a copy of them, with all that they had."""

    def embed(
        self,
        data: Cells | UserCells,
        *,
        variance: bool = False,
        neighbours: int | None = None,
        **reading: Unpack[Reading],
    ) -> AnnData:
        """Add the latent state of each cell, for maps and clusters.

        Parameters
        ----------
        data
            A file, a store, AnnData in memory, or what :meth:`read` gave.
        variance
            Also add the variance of each latent state.
        neighbours
            Also add the graph of so many nearest neighbours under scanpy's own keys, so that ``sc.tl.umap`` and
            ``sc.tl.leiden`` go on at once.
        reading
            ``counts``, ``gene_column``, ``floor`` and others: see :meth:`read`.

        Returns
        -------
        AnnData
            A copy of the cells with ``obsm["X_bgen"]`` (cells x latents), and ``obsm["X_bgen_variance"]`` or
            ``obsp["distances"]`` and ``obsp["connectivities"]`` where asked for.

        Raises
        ------
        UserError
            If the model has no latent space, the cells do not fit the model, or there are fewer than neighbours.

        Examples
        --------
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model")  # which `bgen demo` makes
        >>> cells = model.embed("bgen-demo/cells.h5ad", neighbours=15)
        >>> len(cells.obsm["X_bgen"]) == cells.n_obs, sorted(cells.obsp)
        (True, ['connectivities', 'distances'])
        """
        self.saved.require_vae()
        return embed_cells(self, self.read(data, **reading), variance=variance, neighbours=neighbours)

    def annotate(
        self,
        data: Cells | UserCells,
        label: str | None = None,
        *,
        threshold: float = 0.5,
        **reading: Unpack[Reading],
    ) -> AnnData:
        """Label cells, with probabilities, and with "unknown" for those that look like none of the labels.

        Parameters
        ----------
        data
            A file, a store, AnnData in memory, or what :meth:`read` gave.
        label
            obs column of labels. Cells that have one are learned from; if none has, or there is no such column, the
            model's own training labels of that name are. None: the labels that the model was fine-tuned for.
        threshold
            Least probability of a label; below it a cell is "unknown".
        reading
            ``counts``, ``gene_column``, ``floor`` and others: see :meth:`read`.

        Returns
        -------
        AnnData
            A copy of the cells with obs ``{label}_bgen`` (label or "unknown"), ``{label}_probability`` and
            ``{label}_novelty`` (above 1 a cell is "unknown"), all probabilities in
            ``obsm["{label}_probabilities"]``, and the accuracy beside other ways in ``uns["bgen_annotate"]``.

        Raises
        ------
        UserError
            If nobody knows the labels, or fewer than two of them have five cells or more.

        Examples
        --------
        >>> import anndata
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model")  # which `bgen demo` makes
        >>> cells = anndata.read_h5ad("bgen-demo/cells.h5ad")
        >>> cells.obs.loc[cells.obs_names[::2], "cell_type"] = None  # not known of every other cell
        >>> cells = model.annotate(cells, "cell_type")
        >>> [name for name in cells.obs if name.startswith("cell_type_")]
        ['cell_type_bgen', 'cell_type_probability', 'cell_type_novelty']
        """
        self.saved.require_vae()
        return annotate_cells(self, self.read(data, **reading), label, threshold=threshold)

    def denoise(
        self,
        data: Cells | UserCells,
        *,
        library_size: float | None = None,
        genes: Sequence[str] | None = None,
        **reading: Unpack[Reading],
    ) -> AnnData:
        """Add the expected counts behind the measured ones.

        Genes keep their mean over similar cells; differences within a state of cells are gone, so do not test for
        differential expression on this layer.

        Parameters
        ----------
        data
            A file, a store, AnnData in memory, or what :meth:`read` gave.
        library_size
            Expected total counts of each cell over the model's genes; default: as many as were measured.
        genes
            Ids or symbols: the result has only these genes; default: all of the cells'.
        reading
            ``counts``, ``gene_column``, ``floor`` and others: see :meth:`read`.

        Returns
        -------
        AnnData
            A copy of the cells with ``layers["denoised"]`` (float32; NaN for genes that the model does not know).

        Raises
        ------
        UserError
            If the model has no latent space, the cells do not fit the model, or a gene is unknown to one of them.

        Examples
        --------
        >>> import anndata
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model")  # which `bgen demo` makes
        >>> cells = anndata.read_h5ad("bgen-demo/cells.h5ad")
        >>> some = model.denoise(cells, genes=cells.var_names[:3])
        >>> some.layers["denoised"].shape == (cells.n_obs, 3)
        True
        """
        self.saved.require_vae()
        return denoise_cells(self, self.read(data, **reading), library_size=library_size, genes=genes)

    def integrate(
        self,
        data: Cells | UserCells,
        *,
        reference: str | None = None,
        batch: str | None = None,
        label: str | None = None,
        neighbours: int | None = None,
        genes: Sequence[str] | None = None,
        **reading: Unpack[Reading],
    ) -> AnnData:
        """Add latent states and counts without batch effects, and how well the batches mix.

        Parameters
        ----------
        data
            A file, a store, AnnData in memory, or what :meth:`read` gave.
        reference
            Batch as which counts are decoded; default: the one with most cells.
        batch
            Covariate of the model that is removed; default: its batch, or its only covariate.
        label
            obs column of cell types, to measure by scib-metrics what is lost of them (extra ``integration``).
        neighbours
            Also add the graph of so many nearest neighbours under scanpy's own keys.
        genes
            Ids or symbols: the result has only these genes; default: all of the cells'.
        reading
            ``counts``, ``gene_column``, ``floor`` and others: see :meth:`read`.

        Returns
        -------
        AnnData
            A copy of the cells with ``obsm["X_bgen_integrated"]`` (cells x latents), expected counts in
            ``layers["integrated"]`` (NaN for genes that the model does not know), and in ``uns["bgen_integrate"]``
            how well batches mix beside uncorrected principal components.

        Raises
        ------
        UserError
            If the model was trained without such a covariate, the cells do not have its column or none of its
            batches, there are fewer cells than neighbours, or a gene is unknown to cells or model.

        Examples
        --------
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model")  # which `bgen demo` makes
        >>> cells = model.integrate("bgen-demo/cells.h5ad", batch="batch")
        >>> len(cells.obsm["X_bgen_integrated"]) == len(cells.layers["integrated"]) == cells.n_obs
        True
        """
        self.saved.require_vae()
        cells = self.read(data, **reading)
        return integrate_cells(
            self, cells, reference=reference, batch=batch, label=label, neighbours=neighbours, genes=genes
        )

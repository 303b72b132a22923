"""``bgen embed``: the latent state of each cell, and on request the neighbours of cells in that space."""

from __future__ import annotations

from anndata import AnnData

from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.cells.neighbours import add_neighbours
from bgen.tasks.user_cells import UserCells

EMBEDDING = "X_bgen"


def embed_cells(
    model: AnnDataModel, cells: UserCells, *, variance: bool = False, neighbours: int | None = None
) -> AnnData:
    """Return a copy of the data with the latent means of its cells in ``obsm['X_bgen']`` ``[N, D]``.

    For more cells than fit in memory, see :func:`bgen.tasks.blocks.verbs.embed_in_blocks`.

    Parameters
    ----------
    variance
        Also their variances, in ``obsm['X_bgen_variance']``.
    neighbours
        Also the graph of so many nearest neighbours, under scanpy's own keys, so that ``sc.tl.umap`` and
        ``sc.tl.leiden`` go on at once (:func:`bgen.tasks.cells.neighbours.add_neighbours`).

    Raises
    ------
    UserError
        If there are fewer cells than neighbours.
    """
    mean, spread = model.encode(cells)
    embedded = cells.copy()
    embedded.obsm[EMBEDDING] = mean
    if variance:
        embedded.obsm[f"{EMBEDDING}_variance"] = spread
    if neighbours is not None:
        add_neighbours(embedded, EMBEDDING, neighbours)
    embedded.uns["bgen"] = {**dict(embedded.uns.get("bgen", {})), "embedding_model": model.saved.fingerprint()}
    return embedded

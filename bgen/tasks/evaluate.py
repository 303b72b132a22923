"""``bgen evaluate``: a model's cells beside a baseline and a ceiling, as table, report and model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from bgen.data.as_anndata import read_split
from bgen.errors import MOST_SEEDS, UserError, require_number
from bgen.evaluate.protocols.scores import Scores
from bgen.evaluate.registry import CellsProtocol, find_protocol
from bgen.files import require_new_folder
from bgen.genes.expression import log_cp10k
from bgen.genes.table import match_genes
from bgen.hub.directory import SavedModel, add_metrics
from bgen.progress import Progress
from bgen.store.open import open_store
from bgen.store.store import Store
from bgen.tasks.user_cells import read_user_data
from bgen.track import record as records
from bgen.version import __version__

MOST_CELLS = 20_000
"""Cells of each split that are read."""

SURPLUS = 2
"""Generated cells per test cell, so that every repetition draws another sample of them."""


class Generator(Protocol):
    """What is judged: :class:`bgen.tasks.load.Model`."""

    saved: SavedModel
    folder: Path | None

    @property
    def conditions(self) -> Mapping[str, Any]:
        """What can be asked for."""

    def generate(self, n: int, *, seed: int, progress: Progress | None) -> AnnData:
        """Return new cells."""


def score(
    model: Generator,
    data: Store | str | Path,
    out: Path,
    *,
    generated: Path | None = None,
    seeds: int = 3,
    seed: int = 0,
    protocol: str | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score a model on a store's test split and write ``report.html`` and ``metrics.json``.

    Parameters
    ----------
    model
        A loaded model; its directory, if it has one, gets the scores into its card, unless ``generated`` is given.
    data
        Store with splits train and test, or its folder or address.
    out
        Folder; must not be there, or be empty.
    generated
        An .h5ad to score instead of cells generated now.
    seeds
        Repetitions of every figure.
    protocol
        Id of another protocol than the current one.

    Raises
    ------
    UserError
        If something is missing, or genes do not agree.
    """
    require_number("seeds", seeds, 2, 1000)
    require_number("seed", seed, 0, MOST_SEEDS)
    chosen = find_protocol(CellsProtocol, protocol)
    require_new_folder(out)
    store = data if isinstance(data, Store) else open_store(data)
    train, test = (_read_sample(store, split, seed) for split in ("train", "test"))
    for name, part in (("train", train), ("test", test)):
        _require_variety(part, f"the split {name} of {store.folder}")
    if generated is None:
        cells = _align(model.generate(SURPLUS * test.n_obs, seed=seed, progress=progress), test)
    else:
        cells = _read_generated(generated, store, test)
    cell_type = store.manifest.roles.get("cell_type")

    def advance(done: int, total: int) -> None:
        if progress:
            progress("evaluating", done, total)

    asked = [name for name in model.conditions if name in cells.obs]
    scores = chosen.evaluate(
        train, test, cells, cell_type=cell_type, conditions=asked, seeds=seeds, on_progress=advance
    )
    out.mkdir(parents=True, exist_ok=True)
    scores.save(out / "metrics.json")
    chosen.report(
        out / "report.html",
        scores,
        train,
        test,
        cells,
        seed=seed,
        losses={} if model.folder is None else records.beside(model.folder),
        provenance=_provenance(model, store, generated, seed),
    )
    if generated is None and model.folder is not None:
        add_metrics(model.folder, scores.as_json())
    return scores


def _read_sample(store: Store, split: str, seed: int) -> AnnData:
    if len(store.split(split)) == 0:
        raise UserError(f"The split '{split}' of {store.folder} holds no cells to judge by.")
    return read_split(store, split, MOST_CELLS, seed)


def _read_generated(path: Path, store: Store, test: AnnData) -> AnnData:
    """Return generated cells of a file with the genes of the test cells, all of which must be there, as counts."""
    read = read_user_data(path, floor=1.0).match(store.genes[["id", "symbol", "cells"]].reset_index(drop=True), {})
    return AnnData(read.counts, obs=read.adata.obs.copy(), var=test.var.copy())


def _require_variety(cells: AnnData, what: str) -> None:
    """Raise UserError for cells that no distribution can be compared with."""
    counts = sp.csr_matrix(cells.X)
    if cells.n_vars < 2:
        raise UserError(f"{what} has {cells.n_vars} gene: cells are compared in at least two.")
    logs = log_cp10k(counts)
    spread = np.asarray(logs.multiply(logs).mean(0) - np.square(logs.mean(0))).ravel()
    if not (spread > 1e-8).any():
        raise UserError(f"All cells of {what} are alike: no gene varies among them.")


def _align(cells: AnnData, like: AnnData) -> AnnData:
    """Return the cells with the genes of ``like``, in its order; every one of them must be there."""
    places = match_genes(
        like.var_names.tolist(), cells.var_names.tolist(), floor=1.0, what="the set of generated cells"
    )
    return cells if np.array_equal(places, np.arange(cells.n_vars)) else cells[:, places].copy()


def _provenance(model: Generator, store: Store, generated: Path | None, seed: int) -> dict[str, object]:
    return {
        "model": model.saved.fingerprint()[:16],
        "generated cells": generated.name if generated else f"seed {seed}",
        "store": store.fingerprint[:16],
        "data": ", ".join(source.name for source in store.manifest.sources),
        "bgen": __version__,
    }

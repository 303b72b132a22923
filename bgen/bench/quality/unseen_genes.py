"""``bgen bench genes``: what a model tells of genes that it was not trained on, from what is known of them by name.

A part of the genes is withheld from training altogether, and then added by their vectors (``bgen extend``). Cells that
no training saw are encoded without the counts of these genes, and their expected counts are compared with the measured
ones. The control is the same with vectors shuffled among names.

Axes: N cells, W withheld genes that have a vector.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from rich.table import Table
from scipy import sparse

from bgen.bench.runs import store_of, train_whole
from bgen.errors import UserError
from bgen.evaluate.metrics.counts import variable_genes
from bgen.files import require_new_folder, write_result
from bgen.genes.expression import TARGET_SUM, log_cp10k
from bgen.genes.sets import read_gene_sets
from bgen.genes.table import known_by_vector
from bgen.genes.vectors import read_vectors
from bgen.progress import Say
from bgen.tasks.load import Model, load_model
from bgen.tasks.user_cells import read_input
from bgen.version import __version__

TEST = 0.2
"""Share of the cells that no training sees."""

VECTORS, SHUFFLED = "vectors", "vectors, shuffled"
LEVEL, CELLS = "R2 of the log mean", "correlation over cells"

Figures = dict[str, float]


@dataclass(frozen=True)
class UnseenGenes:
    """Figures of every row and seed."""

    facts: dict[str, Any]
    runs: dict[str, list[Figures]]

    def sentences(self) -> list[str]:
        """Say what vectors tell, beside shuffled ones."""
        said = []
        for key in (LEVEL, CELLS):
            real, other = (np.array([run[key] for run in self.runs[row]]) for row in (VECTORS, SHUFFLED))
            spread = f" (sd {real.std(ddof=1):.3f} over {len(real)} splits)" if len(real) > 1 else ""
            said.append(
                f"Genes never seen, {key}: {real.mean():.3f}{spread}; with vectors shuffled {other.mean():.3f}."
            )
        return said

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {**self.facts, "runs": self.runs, "sentences": self.sentences()}

    def table(self) -> Table:
        """Return all figures."""
        table = Table(
            title=f"Genes that training never saw: {self.facts['data']}",
            caption="Over withheld genes with a vector, on cells not trained on; 0: no more than the mean of all genes,"
            " or than that a gene is the same in all cells.",
            box=None,
            pad_edge=False,
        )
        for heading in ("", "split", "genes", LEVEL, CELLS):
            table.add_column(heading, justify="left" if not heading else "right")
        for row, runs in self.runs.items():
            for number, run in enumerate(runs):
                table.add_row(row, str(number), f"{run['genes']:,.0f}", f"{run[LEVEL]:.3f}", f"{run[CELLS]:.3f}")
        return table


def bench_genes(
    file: Path,
    out: Path,
    *,
    vectors: Sequence[Path] = (),
    sets: Path | None = None,
    size: int = 32,
    genes: int = 2000,
    share: float = 0.2,
    seeds: int = 3,
    steps: int = 800,
    overrides: Sequence[str] = (),
    say: Say,
) -> UnseenGenes:
    """Train without some genes, add them, and measure; write ``genes.json``.

    Parameters
    ----------
    vectors, sets, size
        What is known of genes: as in :class:`bgen.config.gene_set.VectorsConfig`.
    genes
        Variable genes, chosen on cells that are trained on.
    share
        Share of them that is withheld.
    overrides
        Of every training's configuration ``vae``.

    Raises
    ------
    UserError
        If a file cannot be used.
    """
    if not vectors and sets is None:
        raise UserError("bgen bench genes needs what is known of genes: --vectors or --sets.")
    cells = read_input(file)
    require_new_folder(out)
    out.mkdir(parents=True)
    runs: dict[str, list[Figures]] = {VECTORS: [], SHUFFLED: []}
    for seed in range(seeds):
        work = out / "run"
        rng = np.random.default_rng([seed, 47])
        test = rng.permutation(cells.n_obs) < TEST * cells.n_obs
        counts = sparse.csr_matrix(cells.X)
        kept = np.sort(variable_genes(counts[~test], min(genes, cells.n_vars)))
        withheld = rng.permutation(len(kept)) < share * len(kept)
        organism = {key: value for key, value in cells.uns.items() if key == "organism"}
        some = AnnData(counts[:, kept], obs=cells.obs[[]], var=cells.var.iloc[kept], uns=organism)
        enough = np.asarray(some.X[:, ~withheld].sum(1)).ravel() > 0
        store = store_of(some[enough & ~test, ~withheld].copy(), work / "cells", seed)
        for row in runs:
            told: dict[str, Any] = {"files": [str(path) for path in vectors], "size": size}
            told |= {"sets": None if sets is None else str(sets)}
            if row == SHUFFLED:
                told |= _shuffled(vectors, sets, work, seed)
            run = work / "vae"
            given = [f"data.store={store}", f"out={run}", f"seed={seed}", f"train.steps={steps}"]
            given += [f"vae.{half}={json.dumps({'name': name, 'vectors': told})}" for half, name in _HALVES.items()]
            train_whole("vae", [*given, "track.mlflow=false", "track.progress=false", *overrides])
            model = load_model(run / "model", "cpu")
            shutil.rmtree(run)
            figures = _measure(model, some[enough & test].copy(), withheld)
            runs[row].append(figures)
            say(f"{row}, split {seed}: {LEVEL} {figures[LEVEL]:.3f}, {CELLS} {figures[CELLS]:.3f}")
        shutil.rmtree(work)
    facts = {"bgen": __version__, "data": file.name, "cells": cells.n_obs, "genes": genes, "withheld": share}
    facts |= {"known": [path.name for path in (*vectors, *([sets] if sets else []))], "size": size, "steps": steps}
    measured = UnseenGenes(facts | {"seeds": seeds, "overrides": list(overrides)}, runs)
    write_result(out / "genes.json", json.dumps(measured.as_json(), indent=1) + "\n")
    return measured


_HALVES = {"encoder": "gene_set", "decoder": "gene_table"}


def _measure(model: Model, cells: AnnData, withheld: NDArray[np.bool_]) -> Figures:
    """Add the withheld genes and compare what is expected of them with their counts."""
    larger = model.add_genes(cells[:, withheld].copy(), say=_quiet)
    shown = larger.read(cells[:, ~withheld].copy(), floor=0)
    state, _ = larger.encode(shown)
    expected = larger.decode_codes(state, np.ones(len(state), np.float32), larger.covariates(shown)).astype(np.float64)
    new = known_by_vector(larger.saved.genes)
    library = np.asarray(shown.counts.sum(1), np.float64)
    expected *= library / expected[:, ~new].sum(1, keepdims=True)
    true = larger.read(cells, floor=0).counts
    level, found = (np.log((np.asarray(x.sum(0)).ravel()[new] + 0.5) / len(cells)) for x in (true, expected))
    per_cell = np.log1p(expected[:, new] * (TARGET_SUM / library))
    measured = log_cp10k(true)[:, new].toarray()
    return {
        "genes": float(new.sum()),
        LEVEL: float(1 - np.square(found - level).sum() / np.square(level - level.mean()).sum()),
        CELLS: float(_correlations(per_cell, measured).mean()),
    }


def _correlations(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return the correlation of each gene over cells ``[W]``, of ``[N, W]`` twice; 0 where one does not vary."""
    a, b = (values - values.mean(0) for values in (a.astype(np.float64), b.astype(np.float64)))
    size = np.sqrt(np.square(a).sum(0) * np.square(b).sum(0))
    found: NDArray[np.float64] = np.divide((a * b).sum(0), size, out=np.zeros(len(size)), where=size > 1e-9)
    return found


def _shuffled(vectors: Sequence[Path], sets: Path | None, folder: Path, seed: int) -> dict[str, Any]:
    """Write the same files with names shuffled, and return them as settings: each name is known by another one's."""
    rng = np.random.default_rng([seed, 48])
    files = []
    for number, path in enumerate(vectors):
        names, rows = read_vectors(path)
        files.append(folder / f"shuffled_{number}.csv")
        pd.DataFrame(rows, index=rng.permutation(names)).to_csv(files[-1])
    told: dict[str, Any] = {"files": [str(path) for path in files]}
    if sets is not None:
        members = read_gene_sets(sets).members
        every = sorted(set().union(*members.values()))
        other = dict(zip(every, rng.permutation(every), strict=True))
        lines = ["\t".join([name, "", *sorted(other[gene] for gene in genes)]) for name, genes in members.items()]
        (folder / "shuffled.gmt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        told["sets"] = str(folder / "shuffled.gmt")
    return told


def _quiet(_: str) -> None:
    """Say nothing."""

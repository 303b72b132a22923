"""``bgen bench cells``: train on four fifths of a data set, generate, and compare with the other fifth.

Rows: the flow at several numbers of solver steps; bgen's VAE with latents of the training cells (the aggregate
posterior); a negative binomial per type and one around each of 50 clusters; a flow on log counts, if that is asked for;
scvi-tools, from its prior and from its aggregate posterior; real cells. All rows have as many cells as there are test
cells. For each seed cells are split, variable genes chosen on the training cells and everything trained anew, with the
configurations ``vae`` and ``flow``.

Figures are those of the protocol ``distribution-v2`` (:mod:`bgen.evaluate.protocols.distribution`): the embedding is
fitted on a random half of the training cells, and the real cells of the last row come from the other half. No row is
given the types of the test cells.
"""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from rich.table import Table
from scipy import sparse

from bgen.bench.loaders.loaders import machine
from bgen.bench.quality import cells_scvi
from bgen.bench.quality.direct import direct_rows, latent_means
from bgen.bench.runs import train_whole
from bgen.bench.speed.versus import peer_environment, require_peer
from bgen.config.load import stage_overrides
from bgen.errors import UserError
from bgen.evaluate.metrics.counts import variable_genes
from bgen.evaluate.metrics.memorisation import memorisation
from bgen.evaluate.protocols import distribution as protocol
from bgen.evaluate.protocols.baselines import fit_type_negative_binomial
from bgen.evaluate.protocols.inputs import read_cells
from bgen.evaluate.protocols.scores import Estimate
from bgen.files import require_new_folder, write_h5ad
from bgen.models.generators.latent_flow import LatentFlow
from bgen.order.keys import hash_keys
from bgen.progress import Say
from bgen.tasks.generate import decode_counts
from bgen.tasks.load import Model, load_model
from bgen.tasks.user_cells import read_input
from bgen.version import __version__
from data_tools.building.build import build
from data_tools.check.check import check

TEST_SHARE, VALID_SHARE = 0.2, 0.1
REAL, TYPES, CLUSTERS = "real cells", "NB per type", "NB per cluster"
POSTERIOR = "VAE, aggregate posterior"
PEER = {"prior": "scvi-tools, prior", "posterior": "scvi-tools, aggregate posterior"}
TIMED = 3
"""Generations of which the fastest counts."""

SAID = ("w2", "mmd2", "nn_accuracy", "classifier", "precision", "recall")
"""Keys of the figures that are told while it runs."""

Figures = dict[str, dict[str, float]]
"""Row to key to figure."""


@dataclass(frozen=True)
class Split:
    """Raw counts of the same genes: AnnData to train on and to compare with; obs column of the types, or None."""

    train: AnnData
    test: AnnData
    cell_type: str | None


@dataclass(frozen=True)
class Comparison:
    """Figures of every seed, and the facts that belong to them."""

    facts: dict[str, Any]
    runs: list[Figures]

    def estimate(self, row: str, key: str) -> Estimate:
        """Return a figure over seeds."""
        return Estimate(tuple(run[row][key] for run in self.runs))

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        rows = {row: {key: self.estimate(row, key).mean for key in figures} for row, figures in self.runs[0].items()}
        return {**self.facts, "means": rows, "seeds": self.runs}

    def headline(self) -> str:
        """Return one sentence to quote: the first row, beside real cells and the stronger baseline."""
        first = next(iter(self.runs[0]))
        ratio = Estimate(tuple(run[first]["w2"] / run[REAL]["w2"] for run in self.runs))
        copied = sum(run[first]["memorised"] > 0 for run in self.runs)
        told = [f"a W2 of {_shown(ratio, 3)} of that of real cells"]
        for key, name in (("classifier", "a classifier's AUC"), ("precision", "precision"), ("recall", "recall")):
            row, base, real = (self.estimate(r, key).mean for r in (first, CLUSTERS, REAL))
            told.append(f"{name} {row:.3f} (real cells {real:.3f}, negative binomial per cluster {base:.3f})")
        return (
            f"Generated cells of {self.facts['data']} ({first}, {self.facts['genes']:,} genes, {len(self.runs)} splits)"
            f" have {', '.join(told)}; training cells are repeated in {copied} of {len(self.runs)} splits."
        )

    def table(self) -> Table:
        """Return the figures that are looked at most; the others are in the file."""
        table = Table(
            title=f"Generated cells of {self.facts['data']}: {self.facts['genes']:,} genes",
            caption=f"{self.facts['test']:,} cells in each row, mean±sd of {len(self.runs)} seeds. p copied: least"
            " probability of as much likeness to single training cells if nothing were copied; * where that is found.",
            box=None,
            pad_edge=False,
        )
        table.add_column("")
        for name in ("W2", "/ real", "MMD²", "1-NN", "classifier", "precision", "recall", "p copied", "cells/s"):
            table.add_column(name, justify="right")
        real = np.array(self.estimate(REAL, "w2").values)
        for row, figures in self.runs[0].items():
            ratio = Estimate(tuple(np.array(self.estimate(row, "w2").values) / real))
            cells = [_shown(self.estimate(row, "w2"), 2), _shown(ratio, 3)]
            keys = {"mmd2": 4, "nn_accuracy": 3, "classifier": 3, "precision": 3, "recall": 3}
            cells += [_shown(self.estimate(row, key), digits) for key, digits in keys.items()]
            if "p_copied" in figures:
                found = self.estimate(row, "memorised").mean > 0
                cells.append(f"{min(self.estimate(row, 'p_copied').values):.2g}{'*' if found else ''}")
            if "cells_per_s" in figures:
                cells.append(f"{self.estimate(row, 'cells_per_s').mean:,.0f}")
            table.add_row(row, *cells)
        return table


def bench_cells(
    file: Path,
    out: Path,
    *,
    genes: int = 2000,
    seeds: int = 3,
    steps: Sequence[int] = (50, 4, 1),
    python: Path | None = None,
    epochs: int | None = None,
    direct: bool = False,
    overrides: Sequence[str] = (),
    say: Say = print,
) -> Comparison:
    """Compare and write ``cells.json`` into ``out``, after every seed.

    Parameters
    ----------
    file
        .h5ad of counts.
    out
        New folder.
    genes
        Variable genes that are kept, chosen on the training cells; 0: all.
    seeds
        Splits, each with its own training; at least 2.
    steps
        Numbers of solver steps.
    python
        Python that has scvi-tools; None: scvi-tools is left out.
    epochs
        Epochs of scvi-tools; None: its own default.
    direct
        Also train a flow on log counts, with the same settings as the latent flow, and show it and the latent flow as
        expectations, too, at the first number of ``steps`` (:mod:`bgen.bench.quality.direct`).
    overrides
        ``vae.section.key=value`` and ``flow.section.key=value``.

    Raises
    ------
    UserError
        If the data cannot be used, scvi-tools is not there, or a training fails.
    """
    if not file.is_file():
        raise UserError(f"There is no file {file}.")
    if seeds < 2:
        raise UserError(f"--seeds must be at least 2, not {seeds}: the table shows the spread.")
    if not steps or min(steps) < 1:
        raise UserError("--steps: numbers of at least 1, such as 50,4,1.")
    if python is not None:
        require_peer("scvi", python)
    given = stage_overrides(overrides)
    require_new_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    adata = read_input(file)
    runs: list[Figures] = []
    for seed in range(seeds):
        begin = time.perf_counter()
        folder = out / f"seed{seed}"
        folder.mkdir()
        split = split_cells(adata, genes, seed, folder)
        model = train_model(split, folder, given, seed)
        trained = time.perf_counter() - begin
        pools, rates = generated(split, model, steps, seed)
        if direct:
            genes_of = pd.Index(model.genes).get_indexer(split.train.var_names)
            without = train_flow(split, folder / "direct", given, seed, ["flow.space=log_counts", "flow.vae=null"])
            pools |= latent_means(model, genes_of, split.test.n_obs, steps[0], seed)
            pools |= direct_rows(without, genes_of, split.test.n_obs, steps[0], seed)
        if python is not None:
            made, facts = scvi_cells(split, folder, python, epochs, seed)
            pools |= made
            rates |= {PEER[name]: rate for name, rate in facts["cells_per_s"].items()}
        runs.append(compare(split, pools, rates, seed))
        shutil.rmtree(folder)
        for row, figures in runs[-1].items():
            told = ", ".join(f"{key} {figures[key]:.4f}" for key in SAID)
            say(f"seed {seed}: {row}: {told}")
        say(f"seed {seed}: bgen was trained in {trained:.0f} s")
        about = {
            "data": file.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "train": split.train.n_obs,
            "test": split.test.n_obs,
            "genes": split.train.n_vars,
            "overrides": list(overrides),
            "scvi": None if python is None else {name: facts[name] for name in ("version", "epochs", "seconds")},
        }
        compared = Comparison(about, runs)
        (out / "cells.json").write_text(json.dumps(compared.as_json(), indent=1) + "\n", encoding="utf-8")
    return compared


def split_cells(adata: AnnData, genes: int, seed: int, folder: Path) -> Split:
    """Divide cells by seed, keep the genes that vary most among the training cells, and build their store.

    Raises
    ------
    UserError
        If the data holds no counts or cannot be built.
    """
    read_cells({"the data": adata}, None, typed=())
    test = np.zeros(adata.n_obs, bool)
    test[np.random.default_rng(seed).permutation(adata.n_obs)[: int(TEST_SHARE * adata.n_obs)]] = True
    if 0 < genes < adata.n_vars:
        adata = adata[:, variable_genes(sparse.csr_matrix(adata.X[~test]), genes)]
    seen, unseen = adata[~test].copy(), adata[test].copy()
    write_h5ad(seen, folder / "train.h5ad")
    report = check([folder / "train.h5ad"])
    if report.errors:
        raise UserError("The cells cannot be used: `bgen data check` of them says why.")
    splits = {"train": 1 - VALID_SHARE, "valid": VALID_SHARE}
    build(report, folder / "store", created_by=f"bgen {__version__}", splits=splits, seed=seed)
    return Split(seen, unseen, report.roles.cell_type)


def train_model(split: Split, folder: Path, overrides: dict[str, list[str]], seed: int) -> Model:
    """Train VAE and flow as the shipped configurations say; the flow is conditioned on the types, if there are any."""
    train_whole("vae", [*_common(folder, seed), f"out={folder / 'vae'}", *overrides["vae"]])
    return train_flow(split, folder / "flow", overrides, seed, [f"flow.vae={folder / 'vae'}"])


def train_flow(split: Split, run: Path, overrides: dict[str, list[str]], seed: int, settings: Sequence[str]) -> Model:
    """Train a flow in the folder ``run`` beside the store, with ``settings`` that say what space it flows in."""
    conditions = f"flow.conditions={[split.cell_type] if split.cell_type else []}"
    train_whole("flow", [*_common(run.parent, seed), f"out={run}", conditions, *settings, *overrides["flow"]])
    return load_model(run / "model", "cpu")


def _common(folder: Path, seed: int) -> list[str]:
    return [f"seed={seed}", f"data.store={folder / 'store'}", "track.mlflow=false", "track.progress=false"]


def generated(
    split: Split, model: Model, steps: Sequence[int], seed: int
) -> tuple[dict[str, sparse.csr_matrix], dict[str, float]]:
    """Return the counts of bgen's rows, with as many cells as test cells, and cells generated per second."""
    n = split.test.n_obs
    pools, rates = {}, {}
    for number in steps:
        row, seconds = f"bgen, {number} {'step' if number == 1 else 'steps'}", []
        for _ in range(TIMED):
            begin = time.perf_counter()
            cells = model.generate(n, steps=number, seed=seed)
            seconds.append(time.perf_counter() - begin)
        pools[row], rates[row] = sparse.csr_matrix(cells[:, split.train.var_names].X), n / min(seconds)
    pools[f"bgen {POSTERIOR}"] = aggregate_posterior(split.train, model, n, seed)
    rng = np.random.default_rng([seed, 2])
    cells = read_cells({"train": split.train}, split.cell_type, typed=("train",))["train"]
    labels = np.full(len(cells), "") if cells.types is None else cells.types
    wanted = rng.permutation(labels)[:n]
    pools[TYPES] = fit_type_negative_binomial(cells.counts, labels).sample(wanted, seed)
    pools[CLUSTERS] = protocol.fit_baseline(cells).sample(wanted if cells.types is not None else ["all"] * n, seed)
    return pools, rates


@torch.no_grad()
def aggregate_posterior(cells: AnnData, model: Model, n: int, seed: int) -> sparse.csr_matrix:
    """Draw n of the cells, a latent from the posterior of each, and counts ``[n, G]`` of the cell's library size."""
    rng = np.random.default_rng([seed, 3])
    drawn = model.read(cells[rng.permutation(cells.n_obs)[:n]])
    mean, variance = model.encode(drawn)
    z = torch.from_numpy((mean + np.sqrt(variance) * rng.standard_normal(mean.shape)).astype(np.float32))
    library = torch.from_numpy(np.asarray(drawn.adata.X.sum(axis=1)).ravel().astype(np.float32)).log()
    codes = {name: torch.from_numpy(column) for name, column in model.covariates(drawn).items()}
    keys = torch.from_numpy(hash_keys(seed, np.arange(n)).view(np.int64))
    flow = model.saved.module
    assert isinstance(flow, LatentFlow)
    counts = decode_counts(flow, flow.vae.whiten(z, library), codes, keys, library)
    return counts[:, pd.Index(model.genes).get_indexer(cells.var_names)]


def scvi_cells(
    split: Split, folder: Path, python: Path, epochs: int | None, seed: int
) -> tuple[dict[str, sparse.csr_matrix], dict[str, Any]]:
    """Return the counts of scvi-tools' rows, and what :mod:`bgen.bench.quality.cells_scvi` tells of its training.

    Raises
    ------
    UserError
        If the training fails.
    """
    sparse.save_npz(folder / "train.npz", sparse.csr_matrix(split.train.X, dtype=np.float32))
    threads = torch.get_num_threads()
    job = {"folder": str(folder.resolve()), "n": split.test.n_obs, "epochs": epochs, "threads": threads, "seed": seed}
    command = [str(python), str(cells_scvi.__file__), json.dumps(job)]
    environment = peer_environment(threads)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=folder)
    if done.returncode != 0:
        raise UserError(f"training with scvi-tools failed:\n{done.stderr.strip()[-3000:]}")
    made = {row: sparse.csr_matrix(sparse.load_npz(folder / f"{name}.npz")) for name, row in PEER.items()}
    return made, json.loads(done.stdout.splitlines()[-1])


def compare(split: Split, pools: dict[str, sparse.csr_matrix], rates: dict[str, float], seed: int) -> Figures:
    """Measure every row, and real cells as the last one."""
    cells = {name: c.counts for name, c in read_cells({"train": split.train, "test": split.test}, None, ()).items()}
    n = split.test.n_obs
    order = np.random.default_rng([seed, 1]).permutation(split.train.n_obs)
    other, fitted = np.array_split(order, 2)
    if len(other) < n:
        raise UserError(f"{split.train.n_obs + n} cells are too few: twice as many to train on as to compare with.")
    reference = protocol.fit_reference(cells["train"][fitted[: protocol.FIT_CELLS]])
    found: Figures = {}
    for row, counts in pools.items():
        copied = memorisation(cells["train"], cells["test"], counts, seed=seed)
        figures = protocol.measure(reference, cells["test"], counts)
        found[row] = figures | {"p_copied": copied.least, "memorised": float(copied.found)}
        if row in rates:
            found[row]["cells_per_s"] = rates[row]
    found[REAL] = protocol.measure(reference, cells["test"], cells["train"][other[:n]])
    return found


def _shown(estimate: Estimate, digits: int) -> str:
    return f"{estimate.mean:z.{digits}f}±{estimate.sd:.{digits}f}"

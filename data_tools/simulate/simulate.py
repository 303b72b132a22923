"""``bgen data simulate``: single-cell counts whose truth is known.

A lineage tree unfolds over real time and is sampled destructively at a few time points. Each cell type at each time
drives an acyclic regulatory network; knock-outs and drugs act on the network; batches, donors, hidden factors and a
log-normal library size act on the cell; counts are negative binomial.

Axes: N cells, G genes, C conditions, F factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.errors import UserError, nearest
from data_tools.simulate.network import draw_network
from data_tools.simulate.programmes import PROGRAMMES
from data_tools.simulate.screens import SCREENS
from data_tools.simulate.truth import CONDITION, CONTROL, VEHICLE, cell_multipliers, expected_proportions, require_size

LIBRARY_CV = 1.0
"""Coefficient of variation of the library size, as in real droplet data."""

ZEROS = 0.6
"""Share of zeros that the library size is chosen for."""

FACTORS = 3
"""Hidden factors that make genes vary together within a cell type."""

CELLS_AT_ONCE = 4096


@dataclass(frozen=True)
class Preset:
    """A named size. Times in hours, doses in uM; ``depth`` is the number of splits from root to leaf."""

    cells: int
    genes: int
    times: tuple[float, ...]
    depth: int
    knockouts: int
    pairs: int
    drugs: int
    doses: tuple[float, ...]
    batches: int
    donors: int


PRESETS = {
    "tiny": Preset(600, 120, (0.0, 24.0, 48.0), 1, 3, 1, 1, (1.0, 10.0), 2, 2),
    "demo": Preset(4000, 500, (0.0, 24.0, 48.0, 72.0, 96.0), 2, 8, 4, 2, (0.1, 1.0, 10.0), 3, 4),
}


def simulate(
    preset: str = "demo", *, cells: int | None = None, genes: int | None = None, seed: int = 0
) -> anndata.AnnData:
    """Simulate a file of raw counts; the same arguments give the same cells, bit for bit.

    Parameters
    ----------
    preset
        "tiny" (600 x 120, for tests) or "demo" (4,000 x 500).
    cells, genes
        Other sizes than the preset's. The genes and their network do not depend on the number of cells.
    seed
        Seed of everything.

    Returns
    -------
    AnnData with integer counts (float32 CSR) in X; obs: cell_type, batch, donor, time (hours), perturbation
    ("control", "G0012", "G0012+G0040"), drug, dose (uM, vehicle = 0); the truth in ``uns['truth']`` and
    ``obsm['truth']`` (see :mod:`data_tools.simulate.truth`).

    Raises
    ------
    UserError
        If the preset is unknown, or the size is too small for what the preset promises.
    """
    if preset not in PRESETS:
        raise UserError(f"there is no preset '{preset}'.{nearest(preset, [*PRESETS, *SCREENS, *PROGRAMMES])}")
    size = PRESETS[preset]
    n_cells, n_genes = size.cells if cells is None else cells, size.genes if genes is None else genes
    require_size(preset, n_cells, n_genes, (100, 60), seed)
    structure, sampling = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])

    width = max(4, len(str(n_genes)))
    names = pd.Index([f"G{number:0{width}d}" for number in range(1, n_genes + 1)])
    truth = _draw_truth(structure, size, n_genes)
    labels = _choose_knockouts(structure, size, truth, names)
    obs = _draw_obs(sampling, size, truth, labels, n_cells)
    latent = np.concatenate([np.ones((n_cells, 1)), sampling.standard_normal((n_cells, FACTORS))], axis=1)
    # A log-normal has CV = sqrt(exp(sigma^2) - 1).
    sigma = np.sqrt(np.log1p(LIBRARY_CV**2))
    latent[:, 0] = np.exp(sigma * sampling.standard_normal(n_cells) - sigma**2 / 2)

    groups = obs.groupby(CONDITION, observed=True, sort=True)
    conditions = groups.size().index.to_frame(index=False)
    proportions = expected_proportions(truth, conditions, names)
    code = np.asarray(groups.ngroup(), dtype=np.int64)
    latent[:, 0] *= _library_for_zeros(truth, obs, latent, proportions, code)
    counts, gene_mean = _draw_counts(sampling, truth, obs, latent, proportions, code)

    truth["gene_mean"] = gene_mean
    truth["conditions"] = {
        **{column: conditions[column].to_numpy() for column in ("time", "dose")},
        **{column: conditions[column].astype(str).to_numpy(object) for column in ("cell_type", "perturbation", "drug")},
        "cells": groups.size().to_numpy(),
        "proportions": proportions,
    }
    is_regulator = np.isin(np.arange(n_genes), truth["network"]["regulators"])
    kind = np.where(is_regulator, "TF", "GENE")
    var = pd.DataFrame(
        {"symbol": [f"{k}{i}" for i, k in enumerate(kind, start=1)], "is_regulator": is_regulator}, index=names
    )
    obs.index = pd.Index([f"cell_{i:0{len(str(n_cells))}d}" for i in range(1, n_cells + 1)])
    uns = {
        "organism": "synthetic",
        "time_unit": "hours",
        "dose_unit": "uM",
        "simulation": {"preset": preset, "seed": seed, "cells": n_cells, "genes": n_genes, "version": 1},
        "truth": truth,
    }
    return anndata.AnnData(counts, obs=obs, var=var, uns=uns, obsm={"truth": latent})


def _draw_truth(rng: np.random.Generator, size: Preset, n_genes: int) -> dict[str, Any]:
    """Draw what does not depend on the cells: network, tree, drugs, batches, donors, dispersion."""
    base = rng.normal(0.0, 1.2, n_genes)
    network = draw_network(rng, base)
    effect = np.zeros((size.drugs, n_genes))
    for drug in effect:
        hit = rng.choice(n_genes, max(4, n_genes // 40), replace=False)
        drug[hit] = rng.choice([-1.0, 1.0], len(hit)) * rng.uniform(0.7, 2.0, len(hit))
    return {
        "n_genes": n_genes,
        "base": base,
        "network": {key: value for key, value in network.__dict__.items() if key != "n_genes"},
        "tree": _draw_tree(rng, size, n_genes, network.regulators),
        "drugs": {
            "drug": np.array([f"drug_{chr(ord('A') + i)}" for i in range(size.drugs)], dtype=object),
            "ec50": rng.uniform(0.3, 3.0, size.drugs),
            "hill": rng.uniform(1.0, 2.0, size.drugs),
            "effect": effect,
        },
        "batch": _draw_nuisance(rng, "batch", size.batches, n_genes, 0.15),
        "donor": _draw_nuisance(rng, "donor", size.donors, n_genes, 0.08),
        "factor_loading": rng.normal(0.0, 0.2, (FACTORS, n_genes)),
        "dispersion": np.exp(rng.normal(np.log(2.0), 0.5, n_genes)),
    }


def _draw_tree(rng: np.random.Generator, size: Preset, n_genes: int, regulators: NDArray[np.int64]) -> dict[str, Any]:
    """Draw a binary lineage tree: the root is "progenitor", its branches "A", "B", then "A1", "A2", ..."""
    names, parent, level = ["progenitor"], [-1], [0]
    for depth in range(1, size.depth + 1):
        for above in [i for i, at in enumerate(level) if at == depth - 1]:
            for k in range(2):
                names.append("AB"[k] if depth == 1 else f"{names[above]}{k + 1}")
                parent.append(above)
                level.append(depth)
    span = size.times[-1] / (size.depth + 1)
    shift = rng.normal(0.0, 1.0, (len(names), n_genes)) + 1.0
    # A branch drives a quarter of the regulators and a twelfth of the other genes, more of them up than down.
    driven = rng.random((len(names), n_genes)) < np.where(np.isin(np.arange(n_genes), regulators), 0.25, 0.08)
    return {
        "cell_type": np.array(names, dtype=object),
        "parent": np.array(parent),
        "start": np.array(level) * span,
        "end": (np.array(level) + 1) * span,
        "shift": np.where(driven, np.clip(shift, -2.0, 2.5), 0.0),
        "abundance": rng.dirichlet(np.full(len(names), 8.0)),
    }


def _draw_nuisance(rng: np.random.Generator, name: str, n: int, n_genes: int, spread: float) -> dict[str, Any]:
    """Draw the log effect of each batch or donor on each gene."""
    names = np.array([f"{name}_{i}" for i in range(1, n + 1)], dtype=object)
    return {"name": names, "effect": rng.normal(0.0, spread, (n, n_genes))}


def _choose_knockouts(rng: np.random.Generator, size: Preset, truth: dict[str, Any], genes: pd.Index) -> list[str]:
    """Choose regulators that change at least three genes by a quarter where they act most, and pairs of them."""
    # Each candidate is solved once; fifty leave enough choice, whatever the number of genes.
    regulators = genes[rng.permutation(truth["network"]["regulators"])[:50]]
    tree = truth["tree"]
    states = pd.DataFrame({"cell_type": tree["cell_type"], "time": tree["end"], "drug": VEHICLE, "dose": 0.0})
    changed = np.zeros(len(regulators), dtype=int)
    control = expected_proportions(truth, states.assign(perturbation=CONTROL), genes)
    for i, regulator in enumerate(regulators):
        fold = np.log(expected_proportions(truth, states.assign(perturbation=regulator), genes) / control)
        changed[i] = (np.abs(fold) > np.log(1.25)).sum(1).max()
    eligible = regulators[np.argsort(-np.minimum(changed, 4), kind="stable")][: max(2 * size.knockouts, 4)]
    single = sorted(rng.choice(eligible.to_numpy(), size.knockouts, replace=False))
    pairs = ["+".join(pair) for pair in combinations(single, 2)]
    return [*single, *sorted(rng.choice(pairs, size.pairs, replace=False))]


def _draw_obs(
    rng: np.random.Generator, size: Preset, truth: dict[str, Any], labels: list[str], n_cells: int
) -> pd.DataFrame:
    """Draw the cells' time, type and treatment: half are untreated, 30 % knocked out, 20 % drugged."""
    tree = truth["tree"]
    times = np.array(size.times)
    # Types appear when their branch starts, grow along it, and fade after it unless they are leaves.
    age = times[:, None] - tree["start"]
    span = tree["end"] - tree["start"]
    leaf = ~np.isin(np.arange(len(span)), tree["parent"])
    fade = np.where(leaf, 1.0, np.exp(-2 * np.maximum(age / span - 1, 0)))
    share = np.where(age >= 0, (0.2 + np.clip(age / span, 0, 1)) * fade, 0.0) * tree["abundance"]
    share /= share.sum(1, keepdims=True)
    at = rng.integers(len(times), size=n_cells)
    cell_type = (rng.random(n_cells)[:, None] > np.cumsum(share, axis=1)[at, :-1]).sum(1)

    arm = rng.random(n_cells)
    perturbation = np.array([CONTROL, *labels])[np.where(arm < 0.3, rng.integers(1, len(labels) + 1, n_cells), 0)]
    drugged = arm >= 0.8
    drug = np.array([VEHICLE, *truth["drugs"]["drug"]])[np.where(drugged, rng.integers(1, size.drugs + 1, n_cells), 0)]
    dose = np.where(drugged, np.array(size.doses)[rng.integers(len(size.doses), size=n_cells)], 0.0)
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(cell_type, categories=tree["cell_type"]),
            "batch": pd.Categorical(truth["batch"]["name"][rng.integers(size.batches, size=n_cells)]),
            "donor": pd.Categorical(truth["donor"]["name"][rng.integers(size.donors, size=n_cells)]),
            "time": times[at],
            "perturbation": pd.Categorical(perturbation),
            "drug": pd.Categorical(drug),
            "dose": dose,
        }
    )


def _library_for_zeros(
    truth: dict[str, Any],
    obs: pd.DataFrame,
    latent: NDArray[np.float64],
    proportions: NDArray[np.float64],
    code: NDArray[np.int64],
) -> float:
    """Return the mean library size for which :data:`ZEROS` of the counts are expected to be 0, by bisection."""
    some = slice(0, 1000)
    means = proportions[code[some]] * cell_multipliers(truth, obs.iloc[some], latent[some])
    theta = truth["dispersion"]
    low, high = 0.0, 30.0  # logarithms
    for _ in range(30):
        middle = (low + high) / 2
        zeros = np.exp(-theta * np.log1p(np.exp(middle) * means / theta)).mean()
        low, high = (middle, high) if zeros > ZEROS else (low, middle)
    return float(np.exp(low))


def _draw_counts(
    rng: np.random.Generator,
    truth: dict[str, Any],
    obs: pd.DataFrame,
    latent: NDArray[np.float64],
    proportions: NDArray[np.float64],
    code: NDArray[np.int64],
) -> tuple[sp.csr_matrix, NDArray[np.float64]]:
    """Draw NB counts (a Poisson whose rate is gamma distributed) block by block; also return the mean of each gene."""
    theta = truth["dispersion"]
    blocks, total = [], np.zeros(len(theta))
    for start in range(0, len(obs), CELLS_AT_ONCE):
        some = slice(start, start + CELLS_AT_ONCE)
        means = proportions[code[some]] * cell_multipliers(truth, obs.iloc[some], latent[some])
        total += means.sum(0)
        counts = rng.poisson(rng.standard_gamma(np.broadcast_to(theta, means.shape)) * (means / theta))
        blocks.append(sp.csr_matrix(counts.astype(np.float32)))
    return sp.vstack(blocks, format="csr"), total / len(obs)

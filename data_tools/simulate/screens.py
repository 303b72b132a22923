"""Screens in many contexts with known truth: what a perturbation does depends on the context that it meets.

A context (a cell line, say) has a control state u; its cells scatter around it in two subtypes. A perturbation drives
a few gene programmes. How strongly a programme answers depends on the state of the cell, so effects are partly shared
between contexts and partly their own, and what is their own can be foreseen from control cells, but for a part that
cannot. The amount acts through a Hill function, time through a rise that is early in some programmes and late in
others, and control cells drift over time too. With several members at once, their programmes add up, times a factor f:

    log mean_g = base_g + (W u_cell)_g + drift_g(t) + factors + sum_k P_kg r_k
    r_k        = f sum_members h_m(dose) (a_mk s_k(u_cell) + e_ck,m) (1 - exp(-t / tau_k)),
    s_k(u)     = 2 / (1 + exp(-w_k . u - b_k))

and a member's own gene is knocked down.

In a **crowd** no cell knows its answer. A share of the cells of a context stands aside, on either side, so that the
context's mean state does not show it; every cell answers as strongly as that share is large, whatever its own state. So
only a look at the population tells the answer.

Axes: N cells, G genes, K programmes, C contexts, M members, D = 8 dimensions of state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import F64
from bgen.errors import UserError, nearest
from bgen.files import write_whole
from data_tools.simulate.truth import CONTROL, require_size

STATE = np.array([1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6])
"""Spread of contexts in each dimension of the state."""
FACTORS, PROGRAMMES = 3, 10
UNFORESEEN = 0.12
"""Share of the variance of responses that control cells do not tell."""
CELLS_AT_ONCE = 4096
COLUMNS = ("cell_type", "perturbation", "dose", "time")

Truth = Mapping[str, Any]


@dataclass(frozen=True)
class Screens:
    """A named size. Doses in uM, times in hours; ``controls`` is the share of control cells."""

    cells: int
    genes: int
    contexts: int
    singles: int
    pairs: int
    doses: tuple[float, ...]
    times: tuple[float, ...]
    controls: float
    crowd: bool = False


SCREENS = {
    "atlas": Screens(80_000, 500, 16, 30, 10, (0.3, 1.0, 3.0), (6.0, 24.0, 72.0), 0.2),
    "lines": Screens(40_000, 500, 16, 30, 10, (3.0,), (72.0,), 0.2),
    "crowd": Screens(24_000, 200, 24, 4, 0, (1.0,), (24.0,), 0.5, crowd=True),
}


def simulate_screens(
    preset: str = "atlas", *, cells: int | None = None, genes: int | None = None, seed: int = 0
) -> anndata.AnnData:
    """Simulate screens; the same arguments give the same cells, bit for bit.

    Parameters
    ----------
    preset
        "atlas" (80,000 x 500: 16 contexts, 40 perturbations of which 10 are pairs, 3 doses, 3 times), "lines" (40,000 x
        500: the same at one dose and one time) or "crowd" (24,000 x 200: 24 contexts, 4 perturbations).
    cells, genes
        Other sizes than the preset's.
    seed
        Seed of everything.

    Returns
    -------
    AnnData with integer counts (float32 CSR) in X; obs: cell_type (the context), perturbation ("control", "G0012",
    "G0012+G0040"), dose (uM, control = 0), time (hours), batch; the truth in ``uns['truth']`` and ``obsm['truth']``:
    library size, state, factors of each cell.

    Raises
    ------
    UserError
        If the preset is unknown, or the size is too small.
    """
    if preset not in SCREENS:
        raise UserError(f"there is no preset '{preset}'.{nearest(preset, SCREENS)}")
    size = SCREENS[preset]
    n_cells, n_genes = size.cells if cells is None else cells, size.genes if genes is None else genes
    least = size.contexts * (size.singles + size.pairs + 1)
    require_size(preset, n_cells, n_genes, (least, 60), seed)
    structure, sampling = np.random.default_rng([seed, 2]), np.random.default_rng([seed, 3])
    width = max(4, len(str(n_genes)))
    names = pd.Index([f"G{number:0{width}d}" for number in range(1, n_genes + 1)])
    truth = _draw_truth(structure, size, names)
    obs = _draw_obs(sampling, size, truth, n_cells)
    latent = _draw_cells(sampling, truth, obs)
    blocks = []
    for start in range(0, n_cells, CELLS_AT_ONCE):
        some = slice(start, start + CELLS_AT_ONCE)
        mean = _mean(truth, obs.iloc[some], latent[some])
        theta = truth["dispersion"]
        rate = sampling.standard_gamma(np.broadcast_to(theta, mean.shape)) * (mean / theta)
        blocks.append(sp.csr_matrix(sampling.poisson(rate).astype(np.float32)))
    obs.index = pd.Index([f"cell_{i:0{len(str(n_cells))}d}" for i in range(1, n_cells + 1)])
    uns = {
        "organism": "synthetic",
        "time_unit": "hours",
        "dose_unit": "uM",
        "simulation": {"preset": preset, "seed": seed, "cells": n_cells, "genes": n_genes, "version": 1},
        "truth": truth,
    }
    counts = sp.vstack(blocks, format="csr")
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=names), uns=uns, obsm={"truth": latent})


def write_drives(adata: anndata.AnnData, path: Path) -> None:
    """Write which programmes each single perturbation drives, and how strongly: a CSV of names and vectors.

    Raises
    ------
    UserError
        If the cells have no such truth.
    """
    response = adata.uns.get("truth", {}).get("response")
    if response is None:
        raise UserError(f"only the presets {', '.join(SCREENS)} have perturbations that can be written.")
    drive = np.asarray(response["drive"])
    names = pd.Index(np.asarray(adata.uns["truth"]["label"])[: len(drive)], name="name")
    columns = [f"programme_{number + 1}" for number in range(drive.shape[1])]
    write_whole(path, pd.DataFrame(drive, names, columns).to_csv(float_format="%.4f").encode())


def perturbed_mean(
    adata: anndata.AnnData,
    perturbation: str | None = None,
    *,
    dose: float | None = None,
    time: float | None = None,
    foreseen: bool = False,
) -> F64:
    """Return the expected counts ``[N, G]`` of simulated cells had they been treated otherwise.

    Exact: the same cells (context, state, factors, library size) through the equations.

    Parameters
    ----------
    adata
        Simulated cells, or any subset of them, with all genes.
    perturbation, dose, time
        "control", "G0012", "G0012+G0040", ...; uM; hours. None leaves each cell's own. Control cells have dose 0.
    foreseen
        Leave out what control cells do not tell: the best that can be predicted for a context that was never seen.

    Raises
    ------
    UserError
        If the cells have no such truth, or a perturbation is unknown.
    """
    if "truth" not in adata.uns or "response" not in adata.uns["truth"] or "truth" not in adata.obsm:
        raise UserError("these cells have no truth of screens: `bgen data simulate --preset atlas` writes it.")
    obs = adata.obs[list(COLUMNS)].copy()
    for column, value in (("perturbation", perturbation), ("dose", dose), ("time", time)):
        if value is not None:
            obs[column] = value
    return _mean(adata.uns["truth"], obs, np.asarray(adata.obsm["truth"]), foreseen=foreseen)


def _draw_truth(rng: np.random.Generator, size: Screens, names: pd.Index) -> dict[str, Any]:
    """Draw what does not depend on the cells."""
    genes, contexts, singles = len(names), size.contexts, size.singles
    state = rng.normal(size=(contexts, len(STATE))) * STATE
    aside = rng.normal(size=(contexts, len(STATE)))
    aside *= 0.9 / np.linalg.norm(aside, axis=1, keepdims=True)
    share = rng.uniform(0.3, 0.7, contexts)
    sensitivity = rng.normal(size=(PROGRAMMES, len(STATE)))
    sensitivity *= 1.5 / np.linalg.norm(sensitivity * STATE, axis=1, keepdims=True)
    if size.crowd:
        state, aside = 0.5 * state, np.tile(4 * aside[:1], (contexts, 1))
        share = np.linspace(0.05, 0.95, contexts)[rng.permutation(contexts)]
    programme = rng.normal(0, 0.5, (PROGRAMMES, genes)) * (rng.random((PROGRAMMES, genes)) < 0.12)
    drive = np.zeros((singles, PROGRAMMES))
    for row in drive:
        hit = rng.choice(PROGRAMMES, rng.integers(1, 4), replace=False)
        row[hit] = rng.choice([-1.0, 1.0], len(hit)) * rng.uniform(0.6, 1.6, len(hit))
    shift = rng.normal(0, 0.3, PROGRAMMES)
    strength = 2 / (1 + np.exp(-(state @ sensitivity.T + shift)))  # [C, K]
    foreseen = np.einsum("mk,ck->cmk", drive, strength)
    own = rng.normal(size=foreseen.shape) * np.sqrt(UNFORESEEN / (1 - UNFORESEEN) * (foreseen**2).mean())
    targets = np.sort(rng.choice(genes, singles, replace=False))
    labels = names[targets].to_numpy(object)
    pairs = np.sort(rng.permutation(singles)[: 2 * size.pairs].reshape(-1, 2), axis=1)
    return {
        "base": rng.normal(0, 1.1, genes),
        "context": {
            "name": np.array([f"line_{i:02d}" for i in range(1, contexts + 1)], dtype=object),
            "state": state,
            "aside": aside,
            "share": share,
        },
        "loading": rng.normal(0, 0.2, (len(STATE), genes)),
        "factor_loading": rng.normal(0, 0.25, (FACTORS, genes)) * (rng.random((FACTORS, genes)) < 0.4),
        "drift": rng.normal(0, 0.3, genes) * (rng.random(genes) < 0.2),
        "batch": rng.normal(0, 0.1, (2, genes)),
        "programme": programme,
        "response": {
            "crowd": size.crowd,
            "sensitivity": sensitivity,
            "shift": shift,
            "tau": np.geomspace(4.0, 40.0, PROGRAMMES),
            "last": float(size.times[-1]),
            "drive": drive,
            "own": np.zeros_like(own) if size.crowd else own,
            "ec50": rng.uniform(0.4, 2.0, singles),
            "hill": rng.uniform(1.0, 2.0, singles),
            "knock_down": rng.uniform(0.6, 0.95, singles),
            "target": targets,
        },
        "label": np.array([*labels, *("+".join(labels[pair]) for pair in pairs)], dtype=object),
        "factor": np.concatenate([np.ones(singles), rng.uniform(0.5, 1.1, len(pairs))]),
        "dispersion": np.exp(rng.normal(np.log(4.0), 0.4, genes)),
    }


def _draw_obs(rng: np.random.Generator, size: Screens, truth: Truth, n_cells: int) -> pd.DataFrame:
    """Draw contexts and treatments: every context has cells of every perturbation, and control cells."""
    labels, contexts = truth["label"], truth["context"]["name"]
    groups = [(c, p) for c in range(len(contexts)) for p in range(-1, len(labels))]
    weight = np.array([size.controls if p < 0 else (1 - size.controls) / len(labels) for _, p in groups])
    weight /= weight.sum()
    number = 1 + rng.multinomial(n_cells - len(groups), weight)
    context, label = np.repeat(np.array(groups), number, axis=0)[rng.permutation(n_cells)].T
    dose = np.where(label < 0, 0.0, np.array(size.doses)[rng.integers(len(size.doses), size=n_cells)])
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical(contexts[context]),
            "perturbation": pd.Categorical(np.array([*labels, CONTROL], dtype=object)[label]),
            "dose": dose,
            "time": np.array(size.times)[rng.integers(len(size.times), size=n_cells)],
            "batch": pd.Categorical(np.array(["batch_1", "batch_2"])[rng.integers(2, size=n_cells)]),
        }
    )


def _draw_cells(rng: np.random.Generator, truth: Truth, obs: pd.DataFrame) -> F64:
    """Return what is known of each cell: library size, state [D], factors, batch: ``[N, 2 + D + FACTORS]``."""
    context, crowd = truth["context"], truth["response"]["crowd"]
    code = _context(truth, obs)
    aside = rng.random(len(obs)) < context["share"][code]
    # half a unit to either side of the middle; in a crowd those aside stand on both sides, so that the mean stays
    place = np.where(aside, rng.choice([-0.5, 0.5], len(obs)), 0.0) if crowd else aside - 0.5
    state = context["state"][code] + place[:, None] * context["aside"][code]
    state += rng.normal(0, 0.15, state.shape)
    library = np.exp(rng.normal(np.log(2000.0), 0.4, len(obs)))
    batch = (obs["batch"] == "batch_2").to_numpy(np.float64)
    factors = rng.normal(size=(len(obs), FACTORS))
    return np.concatenate([library[:, None], state, factors, batch[:, None]], axis=1)


def _context(truth: Truth, obs: pd.DataFrame) -> NDArray[np.intp]:
    return pd.Index(np.asarray(truth["context"]["name"]).astype(str)).get_indexer(obs["cell_type"].astype(str))


def _mean(truth: Truth, obs: pd.DataFrame, cells: F64, *, foreseen: bool = False) -> F64:
    """Return the expected counts ``[N, G]``: those of the cell's library size in the shares of its log means."""
    state, factors, batch = cells[:, 1 : 1 + len(STATE)], cells[:, 1 + len(STATE) : -1], cells[:, -1].astype(np.intp)
    time = obs["time"].to_numpy(np.float64)
    level = truth["base"] + state @ truth["loading"] + factors @ truth["factor_loading"] + truth["batch"][batch]
    level += (time / truth["response"]["last"])[:, None] * truth["drift"]
    members, amount = _members(truth, obs)
    level += _responses(truth, obs, state, members, amount, time, foreseen) @ truth["programme"]
    for member, target in enumerate(truth["response"]["target"]):
        kept = 1 - truth["response"]["knock_down"][member] * np.minimum(1.0, members[:, member] * amount[:, member])
        level[:, target] += np.log(kept)
    share = np.exp(level)
    mean: F64 = cells[:, :1] * share / share.sum(axis=1, keepdims=True)
    return mean


def _members(truth: Truth, obs: pd.DataFrame) -> tuple[F64, F64]:
    """Return which members act on each cell, times the factor of their combination, and the Hill function of the dose:
    both ``[N, M]``.
    """
    response = truth["response"]
    singles = {str(label): at for at, label in enumerate(truth["label"]) if "+" not in str(label)}
    factor = dict(zip(map(str, truth["label"]), np.asarray(truth["factor"]).tolist(), strict=True))
    labels, code = np.unique(obs["perturbation"].astype(str).to_numpy(), return_inverse=True)
    known = np.zeros((len(labels), len(singles)))
    for row, label in enumerate(labels.tolist()):
        for name in [] if label == CONTROL else label.split("+"):
            if name not in singles:
                raise UserError(f"perturbation '{label}': there is no '{name}' in the truth.{nearest(name, singles)}")
            known[row, singles[name]] = factor.get(label, 1.0)
    dose = obs["dose"].to_numpy(np.float64)[:, None]
    power = np.power(dose, response["hill"], where=dose > 0, out=np.zeros((len(dose), len(singles))))
    return known[code], power / (power + response["ec50"] ** response["hill"])


def _responses(
    truth: Truth, obs: pd.DataFrame, state: F64, members: F64, amount: F64, time: F64, foreseen: bool
) -> F64:
    """Return how far each programme is driven in each cell, ``[N, K]``."""
    response, code = truth["response"], _context(truth, obs)
    acting = members * amount
    if response["crowd"]:
        strength = 2 * truth["context"]["share"][code][:, None] * np.ones(len(response["shift"]))
    else:
        strength = 2 / (1 + np.exp(-(state @ np.asarray(response["sensitivity"]).T + response["shift"])))
    driven = (acting @ response["drive"]) * strength
    if not foreseen:
        driven += np.einsum("nm,nmk->nk", acting, np.asarray(response["own"])[code])
    driven *= 1 - np.exp(-time[:, None] / response["tau"])
    return np.asarray(driven, dtype=np.float64)

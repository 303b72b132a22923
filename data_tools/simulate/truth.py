"""The truth behind a simulated file, and from it what would have happened under another perturbation.

The truth is a dictionary of arrays in ``uns['truth']``, so that it survives a round trip through .h5ad; what is known
of each cell (its expected library size and its hidden factors) is in ``obsm['truth']``, so that it survives subsetting.

Axes: N cells, G genes, C conditions, S states (cell type x time), F factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.errors import UserError, nearest
from data_tools.simulate.network import Network

CONTROL = "control"
VEHICLE = "vehicle"
CONDITION = ["cell_type", "time", "perturbation", "drug", "dose"]
"""obs columns that make a condition."""

Truth = Mapping[str, Any]


def require_size(preset: str, n_cells: int, n_genes: int, least: tuple[int, int], seed: int) -> None:
    """Raise UserError if a preset cannot be had with so few cells or genes, ``least`` of each, or with such a seed."""
    if n_cells < least[0] or n_genes < least[1]:
        raise UserError(
            f"{n_cells} cells x {n_genes} genes is too small: '{preset}' needs at least {least[0]} x {least[1]}."
        )
    if seed < 0:
        raise UserError(f"the seed must not be negative, and is {seed}.")


def network_of(truth: Truth) -> Network:
    """Return the regulatory network of a truth."""
    net = truth["network"]
    return Network(
        net["regulators"], net["source"], net["target"], net["weight"], net["half_saturation"], int(truth["n_genes"])
    )


def state_inputs(tree: Truth, base: NDArray[np.float64], cell_type: NDArray, time: NDArray) -> NDArray[np.float64]:
    """Return the inputs u ``[S, G]`` of states given by the number of their cell type and their time in hours.

    A branch moves from where its parent ended along its own direction (``shift``), linearly in real time, and stays at
    its end.
    """
    progress = np.clip((time - tree["start"][cell_type]) / (tree["end"][cell_type] - tree["start"][cell_type]), 0, 1)
    inputs = base + progress[:, None] * tree["shift"][cell_type]
    ancestor = tree["parent"][cell_type]
    while (ancestor >= 0).any():  # as many rounds as the tree is deep
        inputs += np.where((ancestor >= 0)[:, None], tree["shift"][ancestor], 0.0)
        ancestor = np.where(ancestor >= 0, tree["parent"][ancestor], -1)
    return inputs


def knocked_out(labels: Sequence[str], genes: pd.Index) -> NDArray[np.bool_]:
    """Return which genes each label knocks out, ``[C, G]``: "control", "G0012" or "G0012+G0040".

    Raises
    ------
    UserError
        If a label names a gene that is not in ``genes``.
    """
    distinct, inverse = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    mask = np.zeros((len(distinct), len(genes)), dtype=bool)
    for row, label in enumerate(distinct):
        if label == CONTROL:
            continue
        for gene in label.split("+"):
            if gene not in genes:
                raise UserError(f"perturbation '{label}': there is no gene '{gene}'.{nearest(gene, genes)}")
            mask[row, genes.get_loc(gene)] = True
    return mask[inverse]


def drug_inputs(truth: Truth, drug: NDArray, dose: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what drugs add to the inputs, ``[C, G]``: each one's direction times a Hill function of the dose in uM.

    Raises
    ------
    UserError
        If a drug is not in the truth.
    """
    drugs = truth["drugs"]
    names = pd.Index(np.asarray(drugs["drug"]).astype(str))
    code = names.get_indexer(drug)
    unknown = sorted({str(name) for name in np.asarray(drug)[code < 0]} - {VEHICLE})
    if unknown:
        raise UserError(f"there is no drug '{unknown[0]}' in the truth.{nearest(unknown[0], [*names, VEHICLE])}")
    power = np.power(dose, drugs["hill"][code], where=dose > 0, out=np.zeros(len(dose)))
    response = np.where(code >= 0, power / (power + drugs["ec50"][code] ** drugs["hill"][code]), 0.0)
    return response[:, None] * drugs["effect"][code]


def expected_proportions(truth: Truth, conditions: pd.DataFrame, genes: pd.Index) -> NDArray[np.float64]:
    """Return the expected share of each gene in conditions (columns :data:`CONDITION`), ``[C, G]``, from the equations.

    Shares are relative to the untreated cell of the same type and time, which sums to 1. So a knock-out moves the genes
    downstream of it and no others: what it takes away is missing from the sum, not given to the other genes.

    Raises
    ------
    UserError
        If a cell type, perturbed gene or drug is not in the truth.
    """
    network, tree = network_of(truth), truth["tree"]
    names = pd.Index(np.asarray(tree["cell_type"]).astype(str))
    cell_type = names.get_indexer(conditions["cell_type"].astype(str))
    if (cell_type < 0).any():
        wrong = conditions["cell_type"].astype(str).to_numpy()[cell_type < 0][0]
        raise UserError(f"there is no cell type '{wrong}' in the truth.{nearest(wrong, names)}")
    inputs = state_inputs(tree, truth["base"], cell_type, conditions["time"].to_numpy(np.float64))
    untreated = np.exp(network.solve(inputs, np.zeros(inputs.shape, dtype=bool))).sum(1, keepdims=True)
    inputs = inputs + drug_inputs(
        truth, conditions["drug"].astype(str).to_numpy(), conditions["dose"].to_numpy(np.float64)
    )
    mask = knocked_out(list(conditions["perturbation"].astype(str)), genes)
    return np.exp(network.solve(inputs, mask)) / untreated


def cell_multipliers(truth: Truth, obs: pd.DataFrame, cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what multiplies a condition's proportions to give each cell's expected counts, ``[N, G]``.

    ``cells [N, 1 + F]`` holds the expected library size and the hidden factors. The factors' part has mean 1, so that
    the proportions are the exact means of their conditions; the batch's and the donor's have geometric mean near 1.
    """
    loading = truth["factor_loading"]
    effect = cells[:, 1:] @ loading - 0.5 * (loading**2).sum(0)
    for column in ("batch", "donor"):
        names = pd.Index(np.asarray(truth[column]["name"]).astype(str))
        effect += truth[column]["effect"][names.get_indexer(obs[column].astype(str))]
    return cells[:, :1] * np.exp(effect)


def counterfactual_mean(
    adata: anndata.AnnData,
    perturbation: str | None = None,
    *,
    drug: str | None = None,
    dose: float | None = None,
) -> NDArray[np.float64]:
    """Return the expected counts ``[N, G]`` of simulated cells had they been treated otherwise.

    Exact: the same cells (library size, hidden factors, batch, donor, type, time) through the structural equations.

    Parameters
    ----------
    adata
        Simulated cells, or any subset of them, with all genes.
    perturbation
        "control", "G0012", "G0012+G0040", ...; None leaves each cell's own.
    drug, dose
        Name, and dose in uM; None leaves each cell's own.

    Raises
    ------
    UserError
        If the file holds no truth or not all its genes, or a gene or drug is unknown.
    """
    if "truth" not in adata.uns or "truth" not in adata.obsm:
        raise UserError("these cells have no uns['truth'] and obsm['truth']: `bgen data simulate` writes them.")
    truth = adata.uns["truth"]
    if adata.n_vars != int(truth["n_genes"]):
        raise UserError(f"the truth is about {int(truth['n_genes'])} genes and the file has {adata.n_vars}: keep all.")
    wanted = adata.obs[CONDITION].copy()
    for column, value in (("perturbation", perturbation), ("drug", drug), ("dose", dose)):
        if value is not None:
            wanted[column] = value
    # groupby numbers the conditions, so that each is solved once however many cells it has.
    groups = wanted.groupby(CONDITION, observed=True, sort=True)
    conditions = groups.size().index.to_frame(index=False)
    proportions = expected_proportions(truth, conditions, adata.var_names)
    return proportions[groups.ngroup().to_numpy()] * cell_multipliers(truth, adata.obs, np.asarray(adata.obsm["truth"]))

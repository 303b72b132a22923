"""Groups of a model's genes that tokens of an encoder read: gene sets, or the genes that a regulator acts on.

Axes: G genes of the model, S groups in a file, P groups that are chosen, R kinds of relations between groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.config.gene_set import GroupsConfig, NetworkConfig
from bgen.errors import UserError
from bgen.genes.network import read_edges
from bgen.genes.sets import read_gene_sets
from bgen.genes.table import find_genes

LEAST_COVERED = 0.2
"""Share of the model's genes that must be in some group."""


@dataclass(frozen=True)
class Groups:
    """Groups of genes.

    Attributes
    ----------
    names
        The P names.
    strength
        float32 ``[G, P]``: 0 for genes outside, at most 1 for those within.
    sign
        float32 ``[G, P]``: -1, 0 or 1.
    relations
        float32 ``[2, P, P]``: how strongly group i looks at group j, upwards (to what holds it, or regulates it) and
        downwards.
    sentence
        How much of the model they cover.
    """

    names: list[str]
    strength: NDArray[np.float32]
    sign: NDArray[np.float32]
    relations: NDArray[np.float32]
    sentence: str


def gene_set_groups(config: GroupsConfig, genes: pd.DataFrame) -> Groups:
    """Choose gene sets that together hold the most genes of the model; of equal ones the first is kept.

    Raises
    ------
    UserError
        If the file cannot be used, too few sets are of the sizes asked for, or too few genes are in the chosen ones.
    """
    path = _named(config.file, "vae.encoder.groups.file", "a .gmt file of gene sets")
    sets = read_gene_sets(path)
    by_symbol, by_id = (sets.memberships(genes[name].astype(str).tolist()) for name in ("symbol", "id"))
    members = ((by_symbol + by_id) > 0).tocsc().astype(np.float64)
    chosen = _choose(members, config.tokens, config.at_least, config.at_most, "vae.encoder.groups", path)
    found = members[:, chosen].toarray().astype(np.float32)
    size, common = found.sum(0), found.T @ found
    within = ((common == size[:, None]) & (size[:, None] < size)).astype(np.float32)  # i lies in j
    said = f"{config.tokens} of {len(sets.members):,} gene sets of {path.name}"
    inside = f"; {int(within.any(1).sum())} lie within another" if config.hierarchy else ""
    sentence = _covered(found, said, inside, config.shuffled)
    names = [list(sets.members)[number] for number in chosen]
    order = _order(len(genes), config.shuffled)
    return Groups(names, found[order], np.zeros_like(found), np.stack((within, within.T)), sentence)


def regulator_groups(config: NetworkConfig, genes: pd.DataFrame) -> Groups:
    """Choose regulators that together act on the most genes of the model; they need not be genes of it themselves.

    Strength is the size of an edge's weight over the regulator's largest.

    Raises
    ------
    UserError
        If the file cannot be used, too few regulators have targets enough, or too few genes are targets.
    """
    path = _named(config.file, "vae.encoder.network.file", "a CSV of edges: source, target, weight")
    edges = read_edges(path)
    sources, source = np.unique(edges["source"].str.upper().to_numpy(str), return_inverse=True)
    target = find_genes(genes, edges["target"].tolist())
    used = (target >= 0) & (edges["weight"].to_numpy() != 0)
    place = (target[used], source[used])
    weights = sp.coo_matrix((edges["weight"].to_numpy()[used], place), (len(genes), len(sources))).tocsc()
    weights.eliminate_zeros()
    chosen = _choose(abs(weights).sign(), config.tokens, config.at_least, len(genes), "vae.encoder.network", path)
    found = weights[:, chosen].toarray()
    strength = (np.abs(found) / np.abs(found).max(0)).astype(np.float32)
    said = f"{config.tokens} of {len(sources):,} regulators of {path.name}"
    names = [str(sources[number]) for number in chosen]
    own = pd.Series(np.arange(len(genes)), index=genes["symbol"].astype(str).str.upper()).groupby(level=0).first()
    rows = own.reindex(names).fillna(-1).to_numpy(np.int64)
    regulated = np.where(rows[:, None] >= 0, strength[rows.clip(0)], 0).astype(np.float32)  # i is regulated by j
    edges_between = f"; {int((regulated > 0).sum())} edges join two of them" if config.relations else ""
    sentence = _covered(strength, said, edges_between, config.shuffled)
    order = _order(len(genes), config.shuffled)
    sign = np.sign(found).astype(np.float32)
    return Groups(names, strength[order], sign[order], np.stack((regulated, regulated.T)), sentence)


def _named(path: Path | None, key: str, what: str) -> Path:
    if path is None:
        raise UserError(f"{key} is not given: it names {what}, which training needs.")
    return path


def _choose(members: sp.csc_matrix, wanted: int, least: int, most: int, key: str, path: Path) -> I64:
    """Return the columns of ``members [G, S]`` (0 or 1) that together hold the most genes, taken one by one.

    Where none adds a gene any more, the largest ones follow.
    """
    members.sort_indices()
    columns = [members.indices[a:b] for a, b in zip(members.indptr[:-1], members.indptr[1:], strict=True)]
    seen: set[bytes] = set()
    fitting = []
    for number, column in enumerate(columns):
        content = column.tobytes()
        if least <= len(column) <= most and content not in seen:
            seen.add(content)
            fitting.append(number)
    if len(fitting) < wanted:
        raise UserError(
            f"{key}.tokens={wanted}: only {len(fitting)} groups of {path} hold {least} to {most:,} genes of the model."
            f" Set {key}.tokens={max(1, len(fitting))}, or allow other sizes (at_least, at_most)."
        )
    free = np.ones(members.shape[0], bool)
    chosen: list[int] = []
    while len(chosen) < wanted:
        gains = [(int(free[columns[number]].sum()), len(columns[number]), -number) for number in fitting]
        best = fitting.pop(max(range(len(fitting)), key=gains.__getitem__))
        chosen.append(best)
        free[columns[best]] = False
    return np.array(chosen, np.int64)


def _covered(strength: NDArray[np.float32], said: str, more: str, shuffled: bool) -> str:
    """Say how many of the genes are in some group.

    Raises
    ------
    UserError
        If they are too few.
    """
    held, genes = int((strength > 0).any(1).sum()), len(strength)
    control = " Control: each gene has the groups of another one." if shuffled else ""
    sentence = f"{said} hold {held:,} of the {genes:,} genes ({held / genes:.0%}){more}.{control}"
    if held < LEAST_COVERED * genes:
        raise UserError(
            f"{sentence} At least {LEAST_COVERED:.0%} are needed: choose more groups (tokens) or other sizes, or a file"
            " for this organism and kind of gene names."
        )
    return sentence


def _order(genes: int, shuffled: bool) -> I64:
    """Return whose groups each gene has: its own, or another gene's."""
    return np.random.default_rng(0).permutation(genes) if shuffled else np.arange(genes)

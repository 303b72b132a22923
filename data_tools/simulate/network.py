r"""An acyclic gene-regulatory network whose knock-outs can be computed exactly.

Axes: S states, G genes, R regulators, E edges.

The structural equations, in the causal order of the regulators, with u the input of a state (cell type, time, drug):

.. math::
    x_g = u_g + \sum_{i \to g} w_{ig} (a_i - 1/2) + [g \text{ knocked out}] \log\rho, \qquad
    a_i = \frac{e^{x_i}}{e^{x_i} + K_i}

x is a log rate of transcription, a the activity of a regulator's protein. A knock-out leaves a share rho of the
transcript (the rest decays) and no protein: a = 0. Only genes downstream of it change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

RESIDUAL = 0.1
"""rho: share of the transcript that is left of a gene that is knocked out."""

MAX_DOWNSTREAM = 39
"""Genes downstream of one regulator at most: a knock-out that changes hundreds of genes is not realistic."""


@dataclass(frozen=True)
class Network:
    """Regulators, signed edges and half-saturations of the equations above.

    Attributes
    ----------
    regulators
        int64 ``[R]``: gene numbers in causal order; an edge between regulators goes from an earlier to a later one.
    source, target
        int64 ``[E]``: gene numbers.
    weight
        float64 ``[E]``: w, in units of log rate; positive activates.
    half_saturation
        float64 ``[R]``: K, the rate at which a regulator's activity is one half.
    n_genes
        G.
    """

    regulators: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    weight: NDArray[np.float64]
    half_saturation: NDArray[np.float64]
    n_genes: int

    def solve(self, inputs: NDArray[np.float64], knocked_out: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the log rates x ``[S, G]`` for the inputs u ``[S, G]`` and the genes knocked out ``[S, G]``."""
        position = np.full(self.n_genes, -1)
        position[self.regulators] = np.arange(len(self.regulators))
        edges = sp.csc_matrix(
            (self.weight, (position[self.source], self.target)), shape=(len(self.regulators), self.n_genes)
        )
        log_rate = inputs + np.log(RESIDUAL) * knocked_out
        centred = np.zeros((len(inputs), len(self.regulators)))  # a - 1/2
        for i, gene in enumerate(self.regulators):
            parents = edges.indices[edges.indptr[gene] : edges.indptr[gene + 1]]
            weights = edges.data[edges.indptr[gene] : edges.indptr[gene + 1]]
            log_rate[:, gene] += centred[:, parents] @ weights
            activity = 1 / (1 + self.half_saturation[i] * np.exp(-log_rate[:, gene]))
            centred[:, i] = np.where(knocked_out[:, gene], 0.0, activity) - 0.5
        others = np.flatnonzero(position < 0)
        log_rate[:, others] += centred @ edges[:, others]
        return log_rate

    def descendants(self, gene: int) -> NDArray[np.int64]:
        """Return the numbers of the genes downstream of one, ascending, without itself."""
        graph = sp.csr_matrix((np.ones(len(self.source)), (self.source, self.target)), shape=(self.n_genes,) * 2)
        reached = sp.csgraph.breadth_first_order(graph, gene, return_predecessors=False)
        return np.sort(reached[reached != gene]).astype(np.int64)


def draw_network(rng: np.random.Generator, base: NDArray[np.float64]) -> Network:
    """Draw a network for genes with basal log rates ``base [G]``; raises the regulators' rates in place where too low.

    A regulator has 3 to 12 targets of its own and at most one regulator above it, and no regulator has more than
    :data:`MAX_DOWNSTREAM` genes below it. K is the basal rate, so that regulators act where they respond.
    """
    n_genes = len(base)
    n_regulators = max(8, n_genes // 12)
    regulators = np.sort(rng.choice(n_genes, n_regulators, replace=False))
    rng.shuffle(regulators)
    base[regulators] = np.maximum(base[regulators], -0.5)  # a regulator that is never seen cannot be studied
    others = np.setdiff1d(np.arange(n_genes), regulators)

    n_targets = rng.integers(3, 13, n_regulators)
    source = np.repeat(np.arange(n_regulators), n_targets)
    pairs = np.unique(np.stack([source, rng.choice(others, len(source))]), axis=1)

    parent = np.full(n_regulators, -1)
    below = n_targets.copy()
    for child in range(1, n_regulators):  # tens of regulators; each choice depends on the ones before
        chain, node = [], int(rng.integers(child))
        while node >= 0:
            chain.append(node)
            node = int(parent[node])
        added = 1 + below[child]
        if rng.random() < 0.7 and np.all(below[chain] + added <= MAX_DOWNSTREAM):
            parent[child] = chain[0]
            below[chain] += added
    children = np.flatnonzero(parent >= 0)

    source = regulators[np.concatenate([parent[children], pairs[0]])]
    target = np.concatenate([regulators[children], pairs[1]])
    sign = np.where(rng.random(len(source)) < 0.7, 1.0, -1.0)
    weight = sign * rng.uniform(0.8, 2.2, len(source))
    return Network(regulators, source, target, weight, np.exp(base[regulators]), n_genes)

"""What the labels of a training set mean: the sets that a flow is told of (:mod:`bgen.models.generators.members`).

Axes: L labels, K members of a set, P members, G genes, N cells.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.config.flow import MembersConfig, MemberSizes
from bgen.effects.effects import Effects, Known
from bgen.errors import UserError
from bgen.genes.expression import coexpression_rows
from bgen.genes.vectors import NamedVectors, named_vectors
from bgen.hub.about import Perturbation, RegulatoryNetwork
from bgen.models.generators.members import MemberEmbedding
from bgen.order.groups import parts
from data_tools.check.labels import Grammar, read_grammar

COEXPRESSION_CELLS = 5000
"""Control cells from which it is taken how genes vary together, at most."""


@dataclass(frozen=True)
class LabelSets:
    """The labels of a column and what they mean.

    Attributes
    ----------
    names
        The P members, sorted.
    own
        int64 ``[L, K]``: numbers of the members of each label, -1: padding.
    grammar
        How labels are read.
    """

    names: list[str]
    own: I64
    grammar: Grammar

    @classmethod
    def of(cls, members: Sequence[Sequence[str]], names: list[str], grammar: Grammar) -> LabelSets:
        """Return labels by their members, whose numbers are their places in ``names``; others are left out."""
        place = {name: number for number, name in enumerate(names)}
        own = np.full((len(members), max(map(len, members), default=1) or 1), -1, np.int64)
        for row, of in enumerate(members):
            found = [place[name] for name in of if name in place]
            own[row, : len(found)] = found
        return cls(names, own, grammar)


def label_sets(
    labels: Sequence[str],
    controls: Sequence[str],
    separator: str | None,
    known: Collection[str],
    trained: Collection[str] | None = None,
) -> LabelSets:
    """Read labels.

    Parameters
    ----------
    controls
        Labels of control cells.
    separator
        Between the names of a label; None: found.
    known
        Names of genes.
    trained
        Labels that cells of training have; None: all. Members of others are not learned.

    Raises
    ------
    UserError
        If no label is a perturbation.
    """
    grammar = read_grammar(labels, controls, separator, known)
    members = [grammar.members(label) for label in labels]
    names = sorted(
        {name for label, of in zip(labels, members, strict=True) for name in of if trained is None or label in trained}
    )
    if not names:
        raise UserError("flow.members: no cell of training has a label other than that of controls.")
    return LabelSets.of(members, names, grammar)


@dataclass(frozen=True, eq=False)
class TrainedMembers:
    """The members of a training set, and what is known of them.

    Attributes
    ----------
    column, amount
        Columns of the labels and of their amounts, if there are amounts.
    sets
        What labels mean.
    vectors
        What is known by name.
    amounts
        ``[N]``: of the training cells.
    config
        Settings.
    """

    column: str
    amount: str | None
    sets: LabelSets
    vectors: NamedVectors
    amounts: NDArray[Any] | None
    config: MembersConfig

    @property
    def sizes(self) -> MemberSizes:
        """Sizes of the embedding."""
        return MemberSizes(
            members=len(self.sets.names),
            labels=len(self.sets.own),
            largest=self.sets.own.shape[1],
            names=len(self.vectors.values),
            vector=self.vectors.values.shape[1],
            amount=self.amount,
            forget=self.config.forget,
        )

    def known(self) -> Known:
        """Return what average effects of members that were not trained on are predicted from."""
        vectors, names = self.vectors, self.sets.names
        return Known.of_vectors(vectors.genes, names, vectors.rows(names), vectors.values, vectors.network)

    def facts(self, strata: Sequence[str], effects: Effects | None, contexts: list[list[str]]) -> Perturbation:
        """Return what a model directory says of them.

        Parameters
        ----------
        strata
            Columns that name a context.
        effects
            Average effects that go with the flow, if there are any.
        contexts
            Values of ``strata`` in each context of the effects.
        """
        grammar, vectors = self.sets.grammar, self.vectors
        told: dict[str, Any] = {}
        if effects is not None:
            told = {"effects": effects.named(), "contexts": contexts, "own": len(effects.own)}
            told["pooling"] = effects.pooling
        if vectors.network is not None:
            edges, in_file = vectors.edges
            told["network"] = RegulatoryNetwork(components=len(vectors.network), edges=edges, edges_in_file=in_file)
        return Perturbation(
            perturbations=self.sets.names,
            strata=list(strata),
            column=self.column,
            controls=list(grammar.controls),
            separator=grammar.separator,
            named=vectors.others,
            **told,
        )

    def describe(self, embedding: MemberEmbedding) -> None:
        """Tell an embedding what labels mean."""
        rows, own = self.vectors.rows(self.sets.names), self.sets.own
        of_label = np.where(own >= 0, rows[own.clip(0)], -1)
        values = torch.from_numpy(self.vectors.values)
        embedding.describe(values, torch.from_numpy(own), torch.from_numpy(of_label), typical_amount(self.amounts))


def typical_amount(amounts: NDArray[Any] | None) -> float:
    """Return the geometric mean of amounts above 0; 1 without any."""
    n, logs = 0, 0.0
    every = np.zeros(0) if amounts is None else np.asarray(amounts)
    for part in parts(len(every)):
        given = every[part].astype(np.float64)
        given = given[np.isfinite(given) & (given > 0)]
        n, logs = n + len(given), logs + float(np.log(given).sum())
    return float(np.exp(logs / n)) if n else 1.0


def read_named_vectors(config: MembersConfig, genes: pd.DataFrame, control: sp.csr_matrix | None) -> NamedVectors:
    """Return what is known by name; ``control [N, G]`` are counts of control cells; None: without co-expression.

    Raises
    ------
    UserError
        If a file that is named cannot be used.
    """
    nothing = np.zeros((len(genes), 0), np.float32)
    return named_vectors(config, genes, nothing if control is None else coexpression_rows(control, config.components))

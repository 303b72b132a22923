"""Vectors of a model's genes from files and gene sets, and the map that makes those of further genes in the same way.

What several sources say of a gene stands side by side, and the first singular vectors of what is known of the model's
genes bring it to the size that is asked for. All of that is linear. So a gene's vector is a sum over sources,

    f_g = sum_s (x_gs A_s + c_s),

with x_gs its row in a file of vectors, or which sets it is in; a source that does not know the gene adds nothing.
A model keeps A_s and c_s, and the vectors of the names that its sources knew beyond its own genes.

Axes: G genes of the model, V names beyond them, E numbers of a source (or sets), F size of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.config.gene_set import VectorsConfig
from bgen.errors import UserError
from bgen.genes.sets import GeneSets, read_gene_sets
from bgen.genes.vectors import MOST_COMPONENTS, components, find_places, find_vectors, read_vectors, scale_of

NORM = 4.0
"""Root mean square norm of what a source says of a gene, so that none drowns others."""

LEAST_ALIKE = 0.3
"""Median cosine between the vectors that a file gives of names and those that the model has of them, at least."""

LEAST_SETS = 0.2
"""Share of the sets of training that another file of gene sets must have."""

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class VectorSource:
    """How the rows of one source become vectors.

    Attributes
    ----------
    name
        Its file.
    sets
        Names of its gene sets; None: it is a file of vectors.
    axes, offset
        A_s ``[E, F]`` and c_s ``[F]``.
    """

    name: str
    sets: tuple[str, ...] | None
    axes: F32
    offset: F32

    def __call__(self, rows: F32) -> F32:
        """Return what it says of genes with the rows ``[N, E]``: ``[N, F]``."""
        said: F32 = (rows @ self.axes + self.offset).astype(np.float32)
        return said


@dataclass(frozen=True, eq=False)
class VectorMap:
    """What a model keeps of the sources of its vectors.

    Attributes
    ----------
    sources
        In the order of training.
    others
        The V names that they knew and that are no genes of the model.
    values
        Their vectors, float16 ``[V, F]``.
    """

    sources: tuple[VectorSource, ...]
    others: tuple[str, ...]
    values: NDArray[np.float16]

    def look_up(self, genes: pd.DataFrame, vectors: F32, names: Sequence[str]) -> F32:
        """Return the vectors ``[N, F]`` of names; zeros for what the model has no vector of.

        ``genes`` is the gene table of the model and ``vectors [G, F]`` are those of its genes.
        """
        every = np.concatenate([vectors, self.values.astype(np.float32)])
        rows = find_vectors(genes, self.others, every, names)
        return np.where(rows[:, None] >= 0, every[rows], 0).astype(np.float32)

    def read(
        self, genes: pd.DataFrame, vectors: F32, files: Sequence[Path], sets: Path | None
    ) -> tuple[dict[str, F32], list[str]]:
        """Make vectors of all names in further files, in the way of training: name to ``[F]``, and what to say of it.

        Names are in upper case. ``genes`` and ``vectors`` are as in :meth:`look_up`.

        Raises
        ------
        UserError
            If a file cannot be used, or is not of the kind that the model was trained with.
        """
        found: dict[str, F32] = {}
        said = []
        for path in files:
            names, rows = read_vectors(path)
            made, sentence = self._of_file(path, genes, vectors, names, rows)
            said.append(sentence)
            _add(found, names, made)
        if sets is not None:
            names, made, sentence = self._of_sets(sets)
            said.append(sentence)
            _add(found, names, made)
        return found, said

    def _of_file(self, path: Path, genes: pd.DataFrame, vectors: F32, names: list[str], rows: F32) -> tuple[F32, str]:
        sources = [source for source in self.sources if source.sets is None and len(source.axes) == rows.shape[1]]
        if not sources:
            sizes = [f"{len(source.axes)} ({source.name})" for source in self.sources if source.sets is None]
            raise UserError(
                f"{path} holds vectors of {rows.shape[1]} numbers, and the model was trained with vectors of"
                f" {' and '.join(sizes) or 'gene sets alone'}: give vectors that were made in the same way."
            )
        known = self.look_up(genes, vectors, names)
        shared = known.any(1)
        made = [source(rows) for source in sources]
        alike = [_cosine(of_one[shared], known[shared]) for of_one in made]
        if not shared.any():
            if len(sources) > 1:
                raise UserError(
                    f"{path} has no name of which the model has a vector, so it cannot be told which of its sources"
                    f" ({', '.join(source.name for source in sources)}) it goes on with."
                )
            return made[0], f"{path.name}: it names nothing that the model has a vector of, so its kind is not checked."
        best = int(np.argmax(alike))
        if alike[best] < LEAST_ALIKE:
            raise UserError(
                f"{path}: its vectors of {int(shared.sum()):,} names are not those that the model was trained with"
                f" (median cosine {alike[best]:.2f}, at least {LEAST_ALIKE} is needed). Give vectors that were made in"
                f" the same way as those of {sources[best].name}."
            )
        sentence = (
            f"{path.name}: {len(names):,} vectors, read like {sources[best].name}; of {int(shared.sum()):,} names the"
            f" model has a vector, too (median cosine {alike[best]:.2f})."
        )
        return made[best], sentence

    def _of_sets(self, path: Path) -> tuple[list[str], F32, str]:
        members = read_gene_sets(path).members
        sources = [source for source in self.sources if source.sets is not None]
        if not sources:
            raise UserError(f"{path}: the model was trained with files of vectors, not with gene sets. Give --vectors.")
        (source,) = sources
        assert source.sets is not None
        shared = [name for name in source.sets if name in members]
        if len(shared) < LEAST_SETS * len(source.sets):
            raise UserError(
                f"{path} has {len(shared):,} of the {len(source.sets):,} gene sets that the model was trained with"
                f" ({source.name}), by name; at least {LEAST_SETS:.0%} are needed."
            )
        names = sorted(set().union(*(members[name] for name in shared)))
        place = {name: row for row, name in enumerate(names)}
        made = np.zeros((len(names), source.axes.shape[1]), np.float32)
        for axis, name in zip(source.axes, source.sets, strict=True):
            made[[place[gene] for gene in members.get(name, ())]] += axis
        said = f"{path.name}: {len(shared):,} of the {len(source.sets):,} sets of {source.name}, {len(names):,} genes."
        return names, made + source.offset, said


def fit_vectors(config: VectorsConfig, genes: pd.DataFrame) -> tuple[F32, VectorMap]:
    """Return the vectors ``[G, F]`` of a model's genes, of variance about 1, and the map that makes further ones.

    A gene that no source knows has zeros. Gene sets are known by as many singular vectors as ``size``, 32 at least.

    Raises
    ------
    UserError
        If a file cannot be used, or no gene is known.
    """
    raw: list[tuple[str, tuple[str, ...] | None, list[str], F32, F32 | None]] = []
    for path in config.files:
        names, rows = read_vectors(path)
        raw.append((path.name, None, names, rows, None))
    if config.sets is not None:
        sets = read_gene_sets(config.sets)
        names = sorted(set().union(*sets.members.values()))
        rows, to_rows = components(sets.memberships(names), max(MOST_COMPONENTS, config.size))
        raw.append((config.sets.name, tuple(sets.members), names, rows, to_rows * _set_weights(sets)))
    every = dict.fromkeys(name for _, _, names, _, _ in raw for name in names)
    others = [name for name, row in zip(every, find_places(genes, (), list(every)), strict=True) if row < 0]
    blocks, scales = [], []
    for _, _, names, rows, _ in raw:
        mean, factor = scale_of(rows, NORM)
        places = find_places(genes, others, names)
        block = np.zeros((len(genes) + len(others), rows.shape[1]), np.float32)
        block[places[places >= 0]] = ((rows - mean) * factor).astype(np.float32)[places >= 0]
        blocks.append(block)
        scales.append((mean, factor))
    values = np.concatenate(blocks, axis=1)
    known = values[: len(genes)].any(1)
    if not known.any():
        raise UserError(
            f"vectors: no gene of the model is known by name; its genes look like {', '.join(genes['id'].head(3))}."
        )
    reduction = _reduction(values[: len(genes)][known], config.size)
    vectors = (values @ reduction).astype(np.float32)
    sources, start = [], 0
    for (name, of_sets, _, rows, turn), (mean, factor) in zip(raw, scales, strict=True):
        own = factor * reduction[start : start + rows.shape[1]]
        start += rows.shape[1]
        axes = own if turn is None else turn.astype(np.float64) @ own
        sources.append(VectorSource(name, of_sets, axes.astype(np.float32), (-mean @ own).astype(np.float32)))
    return vectors[: len(genes)], VectorMap(tuple(sources), tuple(others), vectors[len(genes) :].astype(np.float16))


def _reduction(known: F32, size: int) -> NDArray[np.float64]:
    """Return what brings vectors ``[G, E]`` to ``size`` numbers of variance about 1: ``[E, size]``.

    They are turned to their first singular vectors, or zeros are added.
    """
    turn = np.eye(known.shape[1], size)
    if size < known.shape[1]:
        _, _, axes = np.linalg.svd(known.astype(np.float64), full_matrices=False)
        turn = axes[:size].T
    spread = float(np.sqrt(np.square(known @ turn).sum(1).mean() / size))
    return turn / max(spread, 1e-12)


def _set_weights(sets: GeneSets) -> F32:
    """Return what :meth:`GeneSets.memberships` counts a member of each set as, ``[E, 1]``."""
    return np.array([[len(genes) ** -0.5] for genes in sets.members.values()], np.float32)


def _cosine(a: F32, b: F32) -> float:
    """Return the median cosine between the rows of two tables; -1 for empty ones."""
    if not len(a):
        return -1.0
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.median((a * b).sum(1) / np.maximum(norms, 1e-12)))


def _add(found: dict[str, F32], names: Sequence[str], made: F32) -> None:
    """Add what another source says of names, whatever their case."""
    of_source: dict[str, F32] = {}
    for name, row in zip(names, made, strict=True):
        of_source.setdefault(name.upper(), row)
    for name, row in of_source.items():
        found[name] = found[name] + row if name in found else row

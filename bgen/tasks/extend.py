"""``bgen extend``: give a model rows for genes that no training has seen, by what is known of them by name.

A gene's rows come from its vector (:mod:`bgen.genes.vector_map`), through the maps that training has learned: what the
encoder reads of it, and how it varies over states. Its level and dispersion are foretold from the vectors of trained
genes (:mod:`bgen.genes.foretell`). Everything that the model says of other genes stays as it is.

Axes: G genes of the model, N new genes, F size of a vector.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from bgen.errors import UserError
from bgen.genes.table import SOURCE, VECTOR, known_by_vector, match_names
from bgen.genes.vector_map import F32
from bgen.hub.about import Extension, Parent
from bgen.hub.directory import Module, SavedModel
from bgen.models.annotator import Annotator
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.grow import extend_vae, grow_flow
from bgen.models.vae.gene_table import GeneTable
from bgen.models.vae.vae import VAE
from bgen.progress import Say
from bgen.tasks.gene_list import GeneList, read_gene_list, read_pairs
from data_tools.check.findings import listed

BY_ORTHOLOG, BY_NAME, BY_FILE = "by an ortholog", "by name", "from given files"
WAYS = (BY_ORTHOLOG, BY_NAME, BY_FILE)
"""How the vector of a new gene is found, the first that finds one."""


def extend_model(
    saved: SavedModel,
    genes: GeneList,
    *,
    vectors: Sequence[str | PathLike[str]] = (),
    sets: str | PathLike[str] | None = None,
    orthologs: str | PathLike[str] | None = None,
    gene_column: str | None = None,
    say: Say = print,
) -> SavedModel:
    """Return a model that also knows genes which it was not trained on.

    Parameters
    ----------
    genes
        See :func:`bgen.tasks.gene_list.read_gene_list`. Those that the model knows are left as they are; those of which
        nothing is known are left out, and named.
    vectors
        Files of vectors, of names that the files of training did not have: of as many numbers, and made in the same
        way.
    sets
        Gene sets (.gmt) that have the names of those of training, and other genes.
    orthologs
        File with a new gene and, in the second column, the id or symbol of the gene whose vector it gets.
    gene_column
        Column with the ids of ``genes``.
    say
        Told how many genes are known by what, and how well.

    Raises
    ------
    UserError
        If the model has no vectors, a file cannot be used, or no gene is left to be added.
    """
    where, saved = saved.device, saved.to(torch.device("cpu"))
    tables = _tables(saved.vae)
    asked = read_gene_list(genes, gene_column)
    places, _ = match_names(saved.genes, asked["id"].tolist(), asked["symbol"].tolist())
    there = (places >= 0) | asked["id"].isin(saved.genes["id"]).to_numpy()
    new = asked[~there].reset_index(drop=True)
    pairs = [] if orthologs is None else read_pairs(Path(orthologs))
    files, of_sets = [Path(path) for path in vectors], None if sets is None else Path(sets)
    found = {half: _vectors(table, saved.genes, new, files, of_sets, pairs) for half, table in tables.items()}
    ways = found["decoder"][1]
    has = ways >= 0
    left_out = new["id"][~has].tolist()
    counts = {way: int((ways == number).sum()) for number, way in enumerate(WAYS) if (ways == number).any()}
    for sentence in dict.fromkeys([sentence for _, _, told in found.values() for sentence in told]):
        say(sentence)
    how = ", ".join(f"{number:,} {way}" for way, number in counts.items())
    told = [f"{len(asked):,} genes are asked for: {int(has.sum()):,} have a vector{f' ({how})' if how else ''}"]
    told.append(f"{int(there.sum()):,} are in the model already" if there.any() else "none is in the model yet")
    if left_out:
        told.append(f"{len(left_out):,} are left out, since the model has no vector of them: {listed(left_out, 8)}")
    overlap = f"{'; '.join(told)}."
    if not has.any():
        raise UserError(f"No gene can be added. {overlap} --vectors, --sets and --orthologs tell more of genes.")
    say(overlap)
    given = {half: torch.from_numpy(of[has]) for half, (of, _, _) in found.items()}
    if "encoder" not in found:
        say("The encoder has no vectors: counts of the added genes tell it nothing of a cell's state.")
    elif unread := int((~given["encoder"].any(1)).sum()):
        say(f"The encoder has no vector of {unread:,} of the added genes: their counts tell it nothing.")
    trained = ~known_by_vector(saved.genes)
    vae, level_r2 = extend_vae(saved.vae, given, torch.from_numpy(trained))
    learned = int((trained & tables["decoder"].has_vector.numpy()).sum())
    say(
        f"How well such genes are known: of {learned:,} trained genes with a vector, left out a fifth at a time,"
        f" vectors tell {level_r2:.0%} of the variance of their levels."
    )
    before = saved.about.extension
    extension = Extension(
        genes=int(has.sum()) + (before.genes if before else 0),
        ways={way: counts.get(way, 0) + (before.ways.get(way, 0) if before else 0) for way in WAYS},
        trained_genes=learned,
        level_r2=level_r2,
        parent=before.parent if before else Parent(name=saved.about.name, fingerprint=saved.fingerprint()),
    )
    added = new[has].assign(cells=0, **{SOURCE: VECTOR})
    table = saved.genes.assign(**{SOURCE: saved.genes.get(SOURCE, "")})
    larger = replace(
        saved,
        module=_module(saved, vae, added),
        genes=pd.concat([table, added], ignore_index=True),
        about=saved.about.model_copy(update={"extension": extension}),
        metrics=None,
    )
    return larger.to(where)


def _tables(vae: VAE) -> dict[str, GeneTable]:
    """Return the tables that know genes by vectors, whose maps are there.

    Raises
    ------
    UserError
        If the decoder has none, or a map is missing.
    """
    tables = vae.vector_tables
    if "decoder" not in tables:
        raise UserError(
            "This model's decoder has no vectors of genes, so it can say nothing of genes that it was not trained on:"
            " train its VAE with vae.decoder={name: gene_table, vectors: {sets: FILE.gmt}} and, for the encoder to"
            " read them, too, vae.encoder={name: gene_set, vectors: {sets: FILE.gmt}}."
        )
    if any(table.map is None for table in tables.values()):
        raise UserError(
            "The directory of this model does not say how vectors of further genes are made: an earlier bgen wrote it."
            " Write it again from its run: `bgen export RUN --out MODEL`."
        )
    return tables


def _vectors(
    table: GeneTable,
    genes: pd.DataFrame,
    new: pd.DataFrame,
    files: Sequence[Path],
    sets: Path | None,
    pairs: Sequence[tuple[str, str]],
) -> tuple[F32, NDArray[np.int64], list[str]]:
    """Return the vectors of new genes ``[N, F]``, the way each was found (-1: none), and what is said of the files."""
    assert table.map is not None, "it was checked"
    known = table.vectors.numpy()
    given, said = table.map.read(genes, known, files, sets)
    nothing = np.zeros(table.vectors.shape[1], np.float32)

    def from_files(names: Sequence[str]) -> F32:
        rows = [given.get(name.upper(), nothing) for name in names]
        return np.stack(rows) if rows else np.zeros((0, len(nothing)), np.float32)

    def by_name(names: Sequence[str]) -> F32:
        assert table.map is not None, "it was checked"
        return table.map.look_up(genes, known, names)

    ids, symbols = new["id"].tolist(), new["symbol"].tolist()
    rows = np.zeros((len(new), len(nothing)), np.float32)
    ways = np.full(len(new), -1, np.int64)

    def take(way: str, at: NDArray[np.int64], values: F32) -> None:
        open_still = (ways[at] < 0) & values.any(1)
        first = np.unique(at[open_still], return_index=True)[1]  # of several orthologs the first
        picked = np.flatnonzero(open_still)[first]
        rows[at[picked]], ways[at[picked]] = values[picked], WAYS.index(way)

    every = np.arange(len(new))
    place = {name: row for names in (symbols, ids) for row, name in enumerate(names)}
    orthologs = [(place[name], other) for name, other in pairs if name in place]
    if pairs and not orthologs and len(new):
        raise UserError(
            f"The table of orthologs has none of the new genes in its first column, such as {pairs[-1][0]}; they are"
            f" called {listed(ids, 3)}."
        )
    at = np.array([row for row, _ in orthologs], np.int64)
    others = [other for _, other in orthologs]
    for read in (by_name, from_files):
        take(BY_ORTHOLOG, at, read(others))
    for way, read in ((BY_NAME, by_name), (BY_FILE, from_files)):
        for names in (ids, symbols):
            take(way, every, read(names))
    return rows, ways, said


def _module(saved: SavedModel, vae: VAE, added: pd.DataFrame) -> Module:
    """Return the whole model on an extended VAE."""
    module: nn.Module = saved.module
    if isinstance(module, LatentFlow):
        flow = grow_flow(module, vae, module.conditions.sizes)
        _keep_members(saved, flow, added)
        return flow
    if isinstance(module, Annotator):
        annotator = copy.deepcopy(module)
        annotator.vae = vae
        return annotator
    return vae


@torch.no_grad()
def _keep_members(saved: SavedModel, flow: LatentFlow, added: pd.DataFrame) -> None:
    """Let a name that members of perturbations were known by keep its vector when it becomes a gene."""
    facts = saved.about.perturbation
    others = {name.upper(): number for number, name in enumerate(facts.named if facts else [])}
    for part in flow.conditions.member_embeddings.values():
        for row, names in enumerate(zip(added["symbol"], added["id"], strict=True)):
            number = next((others[name.upper()] for name in names if name.upper() in others), None)
            if number is not None and len(part.vectors):
                part.vectors[len(saved.genes) + row] = part.vectors[flow.vae.n_genes + number]

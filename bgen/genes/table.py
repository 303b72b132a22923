"""The gene table of stores and models: ids, symbols, and matching by id, never by position."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.errors import UserError

NAME = "genes.csv"
VERSIONED = r"^(ENS[A-Z]{0,6}G\d{11})\.\d+"
"""An Ensembl gene id with its version."""

COLUMNS = ["id", "symbol", "cells"]
"""``id`` is the key, ``symbol`` for people, ``cells`` how many cells express the gene."""

SOURCE = "source"
"""A fourth column, of a model that knows genes which it was not trained on: :data:`VECTOR`, :data:`TUNED` or ""."""

VECTOR = "vector"
"""What a model says of the gene comes from its vector alone: no training has seen it."""

TUNED = "vector, fine-tuned"
"""The gene was added by its vector, and fine-tuning has then seen its counts."""


def write_genes(genes: pd.DataFrame, folder: Path) -> None:
    """Write a gene table with :data:`COLUMNS`, and :data:`SOURCE` if it has that, into a folder."""
    genes[[*COLUMNS, *([SOURCE] if SOURCE in genes else [])]].to_csv(folder / NAME, index=False)


def known_by_vector(genes: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which genes of a table ``[G]`` a model knows by their vectors alone."""
    return np.asarray(genes[SOURCE] == VECTOR) if SOURCE in genes else np.zeros(len(genes), bool)


def read_genes(folder: Path) -> pd.DataFrame:
    """Read the gene table of a store or model: :data:`COLUMNS`, and :data:`SOURCE` if it has that."""
    return parse_genes((folder / NAME).read_bytes())


def parse_genes(text: bytes) -> pd.DataFrame:
    """Return the gene table that the bytes of its file describe (see :func:`read_genes`)."""
    kinds = {"id": str, "symbol": str, "cells": np.int64, SOURCE: str}
    return pd.read_csv(io.BytesIO(text), dtype=kinds, keep_default_na=False)


def hash_genes(ids: Sequence[str]) -> str:
    """Return the SHA-256 of gene ids in their order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def plain_ids(ids: Sequence[str]) -> list[str]:
    """Return ids as a store has them: Ensembl gene ids without their version, unless that would merge two of them."""
    names = pd.Index(ids).astype(str)
    plain = names.str.replace(VERSIONED, r"\1", regex=True)
    return (plain if plain.is_unique else names).tolist()


def match_genes(wanted: Sequence[str], there: Sequence[str], *, floor: float = 0.8, what: str) -> NDArray[np.int64]:
    """Return for each gene of ``wanted`` its place in ``there``, or -1.

    Parameters
    ----------
    floor
        Least share of ``wanted`` that must be there.
    what
        What ``there`` belongs to, for the message.

    Raises
    ------
    UserError
        Naming both vocabularies if too few genes agree.
    """
    places = pd.Index(plain_ids(there)).get_indexer(pd.Index(wanted))
    found = int((places >= 0).sum())
    if found < floor * len(wanted):
        raise UserError(
            f"{what} has {found:,} of the {len(wanted):,} genes of the model ({found / len(wanted):.0%}, at least"
            f" {floor:.0%} are needed). The model's ids look like {', '.join(wanted[:3])}; those of {what} like"
            f" {', '.join(there[:3])}."
        )
    return places


WAYS = ("id", "id as the model's symbol", "symbol as the model's id", "symbol")
"""How genes of data may be matched to those of a model, the best first."""


def match_names(
    known: pd.DataFrame, ids: Sequence[str], symbols: Sequence[str], *, enough: float = 0.8
) -> tuple[NDArray[np.int64], str]:
    """Return for each gene of some data its place in a gene table, or -1, and the one of :data:`WAYS` that was taken.

    Genes are matched by id where that finds the share ``enough`` of the table; otherwise in the way that finds most, so
    that data with symbols meet a table with Ensembl ids and symbols. A symbol that several genes of the table have is
    the one of them that most training cells express. Several genes of the data may have the same place.

    Parameters
    ----------
    known
        Gene table with :data:`COLUMNS`.
    ids, symbols
        Of the genes of the data, as many of each; ids without version.
    """
    by_id = pd.Series(np.arange(len(known)), index=pd.Index(known["id"].astype(str)))
    by_symbol = pd.Series(np.arange(len(known)), index=pd.Index(known["symbol"].astype(str)))
    by_symbol = by_symbol.iloc[np.argsort(-known["cells"].to_numpy(), kind="stable")]
    by_symbol = by_symbol[~by_symbol.index.duplicated() & (by_symbol.index != "")]
    best, way, most = np.full(len(ids), -1, np.int64), WAYS[0], -1
    for name, (names, table) in zip(
        WAYS, ((ids, by_id), (ids, by_symbol), (symbols, by_id), (symbols, by_symbol)), strict=True
    ):
        places = table.reindex(pd.Index(names)).fillna(-1).to_numpy(np.int64)
        found = len(np.unique(places[places >= 0]))
        if found > most:
            best, way, most = places, name, found
        if name == WAYS[0] and found >= enough * len(known):
            break
    return best, way


def find_genes(genes: pd.DataFrame, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the place of each name among gene ids, else symbols; -1 if it is neither."""
    by_id = pd.Index(genes["id"]).get_indexer(pd.Index(names))
    symbols = pd.Series(np.arange(len(genes)), index=genes["symbol"]).groupby(level=0).first()
    by_symbol = symbols.reindex(pd.Index(names)).fillna(-1).to_numpy()
    return np.where(by_id >= 0, by_id, by_symbol).astype(np.int64)

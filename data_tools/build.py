"""``bgen data build``: from checked files of counts to a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.config.errors import UserError, nearest
from bgen.data.keys import hash_keys
from bgen.data.manifest import Manifest
from bgen.data.manifest import Source as ManifestSource
from data_tools.findings import FileReport, Report, Roles
from data_tools.inputs import open_source
from data_tools.splits import DEFAULT, assign
from data_tools.write import Contents, write_store

Progress = Callable[[str, int, int], None]
"""Called with what is being done, cells done, cells in all."""


def build(
    report: Report,
    out: Path,
    *,
    created_by: str,
    profile: str = "small",
    splits: dict[str, float] | None = None,
    split_by: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Manifest:
    """Write the files of a check into a store and return its manifest.

    Parameters
    ----------
    report
        What :func:`data_tools.check.check` found; it decides matrices, genes, cells and column roles.
    out
        Folder of the store; must not be there, or be empty.
    profile
        Codec profile: "small" or "fast".
    splits
        Split to fraction; default train, valid and test: 0.8, 0.1, 0.1.
    split_by
        Column or role whose values are kept together in one split, such as donor; default: each cell by itself.

    Raises
    ------
    UserError
        If the report has errors, ``split_by`` is unknown, ``out`` is not empty, or the disk is full.
    """
    if report.errors:
        raise UserError(f"The input has {len(report.errors)} error(s): `bgen data check` lists them with their fixes.")
    splits = splits or DEFAULT
    total = sum(file.n_cells for file in report.files)
    parts: list[sp.csr_matrix] = []
    frames, rows = [], []
    for number, file in enumerate(report.files):
        done = sum(part.shape[0] for part in parts)
        parts.append(_read_counts(file, len(report.genes), seed, number, done, total, progress))
        frames.append(open_source(file.path).obs)
        rows.append(np.arange(file.n_cells))
    keep = np.concatenate([file.keep for file in report.files])
    obs = pd.concat(frames) if len(frames) > 1 else frames[0]
    obs = obs.loc[keep]
    roles = _roles(report.roles)
    groups = None
    if split_by is not None:
        column = roles.get(split_by, split_by)
        if column not in obs:
            raise UserError(f"There is no column or role '{split_by}' to split by.{nearest(split_by, obs.columns)}")
        groups = obs[column].astype(str).to_numpy()
        split_by = column
    source = np.repeat(np.arange(len(report.files), dtype=np.int32), [file.n_cells for file in report.files])
    contents = Contents(
        counts=_stack(parts) if keep.all() else _stack(parts)[keep],
        genes=pd.DataFrame({"id": report.genes.index.astype(str), "symbol": report.genes["symbol"].astype(str)}),
        obs=obs,
        split=assign(splits, groups, len(obs), seed),
        splits=list(splits),
        source=source[keep],
        row=np.concatenate(rows)[keep],
        sources=[_source(file, report) for file in report.files],
        organism=report.organism,
        roles=roles,
        units={
            role: unit
            for role, unit in (("time", report.roles.time_unit), ("dose", report.roles.dose_unit))
            if unit is not None
        },
        control=report.roles.control,
        split_by=split_by,
    )

    def written(done: int, cells: int) -> None:
        if progress:
            progress("writing", done, cells)

    return write_store(out, contents, profile=profile, seed=seed, created_by=created_by, progress=written)


def _read_counts(
    file: FileReport, n_genes: int, seed: int, number: int, done: int, total: int, progress: Progress | None
) -> sp.csr_matrix:
    """Return the counts of a file ``[N, G]`` as uint32 in the order of the final genes."""
    used = np.flatnonzero(file.gene_map >= 0)
    genes = file.gene_map[used]
    one_to_one = len(np.unique(genes)) == len(genes)
    merge = sp.csr_matrix((np.ones(len(used), np.uint32), (used, genes)), shape=(len(file.gene_map), n_genes))
    parts = []
    for start, chunk in open_source(file.path).iterate(file.matrix):
        values = _integers(chunk.data, file.rounding, seed, number, start)
        chunk = sp.csr_matrix((values, chunk.indices, chunk.indptr), shape=chunk.shape)
        chunk.eliminate_zeros()
        parts.append(_renumber(chunk, file.gene_map, n_genes) if one_to_one else sp.csr_matrix(chunk @ merge))
        if progress:
            progress("reading", done + start + chunk.shape[0], total)
    return _stack(parts)


def _renumber(chunk: sp.csr_matrix, gene_map: NDArray[np.int64], n_genes: int) -> sp.csr_matrix:
    """Return a chunk with its columns renumbered; columns with number -1 are left out."""
    columns = gene_map[chunk.indices]
    kept = columns >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[chunk.indptr]
    renumbered = sp.csr_matrix((chunk.data[kept], columns[kept], indptr), shape=(chunk.shape[0], n_genes))
    renumbered.sort_indices()
    return renumbered


def _integers(values: NDArray[np.generic], rounding: str, seed: int, number: int, start: int) -> NDArray[np.uint32]:
    """Return counts as integers; what is no integer is rounded as the report says, and says in the manifest."""
    if rounding == "nearest":
        values = np.rint(values.astype(np.float64))
    elif rounding == "stochastic":
        draw = hash_keys(seed, number, start, np.arange(len(values))) >> np.uint64(11)
        values = np.floor(values.astype(np.float64) + draw.astype(np.float64) * 2.0**-53)
    return values.astype(np.uint32)


def _stack(parts: Sequence[sp.csr_matrix]) -> sp.csr_matrix:
    return parts[0] if len(parts) == 1 else sp.csr_matrix(sp.vstack(parts, format="csr"))


def _roles(roles: Roles) -> dict[str, str]:
    named = {role: column for column, role in roles.columns().items() if role != "condition"}
    if len(roles.condition) == 1:
        named["condition"] = roles.condition[0]
    return named


def _source(file: FileReport, report: Report) -> ManifestSource:
    paths = [file.path] if file.path.is_file() else file.path.rglob("*")
    size = sum(path.stat().st_size for path in paths if path.is_file())
    fixes = sorted({f.id for f in report.findings if f.level == "fix" and f.where in ("", str(file.path))})
    return ManifestSource(
        name=file.path.name, bytes=size, cells=file.n_cells, kept=int(file.keep.sum()), matrix=file.matrix, fixes=fixes
    )

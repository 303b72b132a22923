"""``bgen data build``: from checked files of counts to a store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.cpus import cpus
from bgen.errors import UserError, nearest
from bgen.order.groups import parts
from bgen.progress import Progress
from bgen.store.format.manifest import Manifest
from bgen.store.format.manifest import Source as ManifestSource
from data_tools.building.partial import WORK, Plan, all_or_nothing, save_array
from data_tools.building.pieces import Piece, cut_file
from data_tools.building.run_tasks import open_runner
from data_tools.building.splits import DEFAULT, Codes, assign, assign_groups, group_names, require_cells
from data_tools.building.write import Contents, fill
from data_tools.cells.barcodes import Barcodes, texts_of
from data_tools.cells.columns import Joined, Table, code_type
from data_tools.cells.mapped import fill as fill_array
from data_tools.cells.mapped import room
from data_tools.cells.texts import Texts
from data_tools.check.findings import FILE_COLUMN, FileReport, Report, Roles
from data_tools.check.obs import take_roles
from data_tools.check.vocabulary import take_reference
from data_tools.inputs.registry import open_source
from data_tools.inputs.source import Source

LARGE = 200_000_000
"""With this many stored values, a build starts worker processes by itself."""


def build(
    report: Report,
    out: Path,
    *,
    created_by: str,
    profile: str = "small",
    splits: dict[str, float] | None = None,
    split_by: str | None = None,
    held_out: Mapping[str, Sequence[str]] | None = None,
    reference: Path | None = None,
    seed: int = 0,
    workers: int | None = None,
    scheduler: str | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the files of a check into a store and return its manifest.

    After a build was killed, the same call goes on with it. The store depends on the files and the options alone, not
    on the number of workers nor on interruptions.

    Parameters
    ----------
    report
        What :func:`data_tools.check.check.check` found; it decides matrices, genes, cells and column roles.
    out
        Folder of the store; must not be there, or be empty.
    profile
        Codec profile: "small" or "fast".
    splits
        Split to fraction; default train, valid and test: 0.8, 0.1, 0.1.
    split_by
        Column or role whose values are kept together in one split, such as donor, perturbation (except its control,
        which is divided among the splits) or time; default: each cell by itself.
    held_out
        Split to the values of ``split_by`` that it consists of; the other cells are divided among the other splits.
    reference
        File with the gene ids that the store is to have (:func:`data_tools.check.vocabulary.read_reference`);
        default: the genes of all inputs.
    workers
        Worker processes; 0: work in this process; default: one for each core (at most 8) for :data:`LARGE` inputs, else
        0. Each needs less than 2 GB.
    scheduler
        Address of a Dask scheduler to use instead, ``tcp://host:port``; its workers must see the files and ``out``.
    restart
        Throw away what an interrupted build with other options left.

    Raises
    ------
    UserError
        If the report has errors, an option does not fit the data, ``out`` is not empty, or the disk is full.
    """
    if report.errors:
        raise UserError(f"The input has {len(report.errors)} error(s): `bgen data check` lists them with their fixes.")
    out = out.absolute()
    sources = [_open(file, report) for file in report.files]
    n_rows = [file.n_cells for file in report.files]
    first_rows = np.concatenate([[0], np.cumsum(n_rows)])
    keeps = [file.keep for file in report.files]
    kept, origin, row = _origins(keeps)
    joined = Joined([file.obs for file in report.files], keeps, every=True)
    obs: Table
    obs, names = name_cells(joined, kept, origin, report)
    roles = _roles(report.roles)
    obs = take_roles(obs, roles, _units(report.roles))
    splits = splits or DEFAULT
    split_by, codes = _split(obs, roles, report.roles.control, splits, split_by, held_out or {}, seed)
    genes = pd.DataFrame({"id": report.genes.index.astype(str), "symbol": report.genes["symbol"].astype(str)})
    genes = genes.reset_index(drop=True)
    places = np.arange(len(genes))
    if reference is not None:
        genes, places = take_reference(genes, reference)
    # where the column of a file ends up: -1 stays -1, since the last entry of the look-up is -1
    gene_maps = [np.append(places, -1)[file.gene_map] for file in report.files]

    def contents(pieces: Sequence[Piece]) -> Contents:
        return Contents(
            counts=pieces,
            genes=genes,
            obs=obs,
            split=codes,
            splits=list(splits),
            source=origin,
            row=row,
            sources=[_source(*one, report) for one in zip(report.files, sources, gene_maps, strict=True)],
            organism=report.organism,
            roles=roles,
            units=_units(report.roles),
            control=report.roles.control,
            split_by=split_by,
            held_out={name: list(values) for name, values in (held_out or {}).items()},
            vocabulary="union" if reference is None else reference.name,
            kept=kept,
            names=names,
        )

    options = {"profile": profile, "seed": seed, "created_by": created_by}
    plan = _plan(report, sources, contents([]), gene_maps, {**options, "splits": splits, "split_by": split_by})
    with all_or_nothing(out, plan, restart=restart) as partial:
        pieces: list[Piece] = []
        for number, (source, file) in enumerate(zip(sources, report.files, strict=True)):
            path = partial / WORK / f"genes-{number:05d}.npy"
            save_array(path, gene_maps[number])
            pieces += cut_file(source, file, number=number, offset=int(first_rows[number]), seed=seed, genes=path)
        with open_runner(_choose_workers(workers, sources, report.files), scheduler, partial) as runner:
            return fill(
                partial,
                contents(pieces),
                profile=profile,
                seed=seed,
                created_by=created_by,
                progress=progress or (lambda what, done, cells: None),
                runner=runner,
            )


def _open(file: FileReport, report: Report) -> Source:
    """Open a file again, of whose obs the report has all.

    Raises
    ------
    UserError
        If it has another number of cells.
    """
    source = open_source(file.path.absolute() if file.cells is None else file.cells, names := Texts())
    if report.samples is not None:
        report.samples.join(source)
    if source.n_cells != file.n_cells:
        raise UserError(f"{file.path} was changed after it was checked. Check it again.")
    del names
    source.obs = pd.DataFrame(index=pd.RangeIndex(source.n_cells))
    return source


def _origins(keeps: Sequence[NDArray[np.bool_]]) -> tuple[I64, NDArray[np.int32], I64]:
    """Return of each cell its number among the rows of all files, its file, and its row there."""
    n = sum(int(np.count_nonzero(keep)) for keep in keeps)
    kept, source, row = room(n, np.int64), room(n, np.int32), room(n, np.int64)
    at = before = 0
    for number, keep in enumerate(keeps):
        for part in parts(len(keep)):
            rows = part.start + np.flatnonzero(keep[part])
            here = slice(at, at + len(rows))
            kept[here], source[here], row[here] = before + rows, number, rows
            at += len(rows)
        before += len(keep)
    return kept, source, row


def name_cells(obs: Joined, kept: I64, source: NDArray[np.int32], report: Report) -> tuple[Joined, Barcodes]:
    """Return obs and the names of its cells, with names and a column that tell apart cells of one barcode in files."""
    if not report.shared_barcodes:
        return obs, Barcodes(report.names, kept)
    paths = [file.path for file in report.files]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):  # sample_1/filtered.h5, sample_2/filtered.h5
        names = [f"{path.parent.name}/{path.name}" for path in paths]
    if len(set(names)) < len(names):
        names = [f"{number}:{name}" for number, name in enumerate(names, start=1)]
    column = FILE_COLUMN
    while column in obs:
        column += "_"
    texts = sorted(names)
    table = np.array([texts.index(name) for name in names], code_type(len(names)))
    codes = fill_array(len(source), table.dtype, lambda part: table[source[part]])
    file = pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(pd.Index(texts, dtype=object)))
    endings = texts_of([f"-{name}" for name in names])
    named = obs.assign(**{column: file})
    named.columns.insert(len(report.files[0].obs.columns), named.columns.pop())  # behind those of the first file
    return named, Barcodes(report.names, kept, source, endings)


def _choose_workers(workers: int | None, sources: Sequence[Source], files: Sequence[FileReport]) -> int:
    if workers is not None:
        return workers
    if any(source.is_in_memory for source in sources):  # every worker would get a copy
        return 0
    values = 0
    for source, file in zip(sources, files, strict=True):
        about = source.matrices[file.matrix]
        values += about.shape[0] * about.shape[1] if about.stored < 0 else about.stored
    return min(8, cpus()) if values >= LARGE else 0


def _split(
    obs: Table,
    roles: Mapping[str, str],
    control: str | None,
    splits: Mapping[str, float],
    split_by: str | None,
    held_out: Mapping[str, Sequence[str]],
    seed: int,
) -> tuple[str | None, Codes]:
    """Return the column that cells are split by and the code of each cell's split."""
    if split_by is None:
        if held_out:
            raise UserError("To hold out values, say of which column: split_by.")
        codes = assign(splits, None, len(obs), seed)
        require_cells(splits, codes)
        return None, codes
    column = roles.get(split_by, split_by)
    if column not in obs:
        raise UserError(f"There is no column or role '{split_by}' to split by.{nearest(split_by, obs.columns)}")
    spread = control if column == roles.get("perturbation") else None
    codes = assign_groups(splits, group_names(obs[column]), seed, held_out=held_out, spread=spread)
    require_cells(splits, codes)
    return column, codes


def _plan(
    report: Report,
    sources: Sequence[Source],
    contents: Contents,
    gene_maps: Sequence[NDArray[np.int64]],
    options: Mapping[str, object],
) -> Plan:
    """Return what tells this build from any other one; ``sources`` are the open files of the report."""

    def digest(*arrays: NDArray[np.generic]) -> str:
        found = hashlib.sha256()
        for array in arrays:
            for part in parts(len(array)):
                found.update(np.ascontiguousarray(array[part]).data)
        return found.hexdigest()

    return {
        "the input files": json.dumps([source.state() for source in sources]),
        "the matrix or the rounding": json.dumps([[file.matrix, file.rounding] for file in report.files]),
        "the genes": hashlib.sha256("\n".join(contents.genes["id"]).encode()).hexdigest() + digest(*gene_maps),
        "the cells": digest(contents.row, contents.source),
        "the splits": json.dumps([contents.splits, options["splits"], options["split_by"]]) + digest(contents.split),
        "the roles of columns": json.dumps([dict(contents.roles), dict(contents.units), contents.control]),
        "the codec profile": str(options["profile"]),
        "the seed": str(options["seed"]),
        "the version of bgen": str(options["created_by"]),
    }


def _roles(roles: Roles) -> dict[str, str]:
    """Return role to column; a second column of conditions is condition_2, and so on."""
    named = {role: column for column, role in roles.columns().items() if role != "condition"}
    for number, column in enumerate(roles.condition, start=1):
        named["condition" if number == 1 else f"condition_{number}"] = column
    return named


def _units(roles: Roles) -> dict[str, str]:
    return {role: unit for role, unit in (("time", roles.time_unit), ("dose", roles.dose_unit)) if unit is not None}


def _source(file: FileReport, source: Source, gene_map: NDArray[np.int64], report: Report) -> ManifestSource:
    fixes = sorted({f.id for f in report.findings if f.level == "fix" and f.where in ("", str(file.path))})
    return ManifestSource(
        name=file.path.name,
        bytes=source.size(),
        cells=file.n_cells,
        kept=int(file.keep.sum()),
        matrix=file.matrix,
        kind=file.kind,
        rounding=file.rounding,
        genes=len(np.unique(gene_map[gene_map >= 0])),
        genes_left_out=int(((gene_map < 0) & (file.gene_map >= 0)).sum()),
        fixes=fixes,
    )

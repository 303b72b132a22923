"""A SOMA experiment, as CELLxGENE Census is published, through tiledbsoma (extra ``census``).

It is given by its folder, or by a text file ``NAME.soma.yaml`` that names it, here or at an address, and says which of
its cells are wanted:

    experiment: s3://cellxgene-census-public-us-west-2/cell-census/2025-01-30/soma/census_data/homo_sapiens
    cells: tissue_general == 'blood' and is_primary_data == True
    columns: [cell_type, donor_id, assay]
    region: us-west-2
    anonymous: true

The layer ``raw`` is the matrix X, as Census has it, or the only layer if there is one; other layers are layers.
Annotation of the cells that are wanted is in memory; counts are read a block of cells at a time.

Axes: N cells that are wanted, G genes of the experiment.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import yaml
from numpy.typing import NDArray

from bgen.errors import UserError, nearest
from data_tools.inputs.source import Matrix, Source

SUFFIX = ".soma.yaml"
GROUP = "__tiledb_group.tdb"
"""What the folder of a group of TileDB holds."""

MEASUREMENT, LAYER = "RNA", "raw"
"""What Census calls the counts of genes; any names will do where there is one of each."""

JOIN = "soma_joinid"
CELL_NAMES, GENE_NAMES = ("obs_id", "cell_id", "barcode"), ("feature_id", "var_id", "gene_id")
"""Columns that name cells and genes; the first of them that is there becomes the index."""

KEYS = ("experiment", "cells", "columns", "measurement", "region", "anonymous")


@dataclass
class SomaSource(Source):
    """Cells of an experiment.

    Attributes
    ----------
    where
        Folder or address of the experiment.
    measurement, layers
        Measurement that is read, and the name of the layer that each matrix is.
    cells, genes
        Numbers, in the experiment, of the cells ``[N]`` and genes ``[G]``, ascending.
    settings
        Of TileDB.
    """

    where: str = ""
    measurement: str = MEASUREMENT
    layers: dict[str, str] = field(default_factory=dict)
    cells: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    genes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    settings: dict[str, str] = field(default_factory=dict)

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        with _opened(self.path, self.where, self.settings) as experiment:
            layer = experiment.ms[self.measurement].X[self.layers[name]]
            for first in range(start, stop, step):
                yield first, self._block(layer, self.cells[first : min(first + step, stop)])

    def _block(self, layer: Any, wanted: NDArray[np.int64]) -> sp.csr_matrix:
        """Return some cells, ``[n, G]``."""
        parts = []
        for table in layer.read((wanted, slice(None))).tables():
            cell, gene, value = (table.column(name).to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
            column = np.searchsorted(self.genes, gene)
            if len(gene) and not np.array_equal(self.genes[np.minimum(column, len(self.genes) - 1)], gene):
                raise ValueError("it has values of genes that var does not have")
            parts.append((value, np.searchsorted(wanted, cell), column))
        shape = (len(wanted), len(self.genes))
        if not parts:
            return sp.csr_matrix(np.zeros(shape, self.matrices["X"].dtype if "X" in self.matrices else np.float32))
        values, rows, columns = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return sp.csr_matrix((values, (rows, columns)), shape=shape)

    def state(self) -> list[object]:
        """See :class:`Source`; of an experiment at an address, which cells and genes are read."""
        if self.path.is_dir():
            return super().state()
        digest = hashlib.sha256()
        for numbers in (self.cells, self.genes, np.array([about.stored for about in self.matrices.values()])):
            digest.update(numbers.tobytes())
        place = Path(self.where)
        there = _stamps(place) if place.is_dir() else []
        columns = [str(name) for name in self.obs.columns]
        return [str(self.path.absolute()), self.where, digest.hexdigest(), columns, *there]

    def size(self) -> int:
        """See :class:`Source`; of an experiment at an address, about what is read of it."""
        if self.path.is_dir():
            return super().size()
        return sum(about.stored * about.dtype.itemsize for about in self.matrices.values())


def _stamps(folder: Path) -> list[int]:
    """Return what changes when a file of a folder is written again."""
    stats = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return [len(stats), sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)]


def is_soma(path: Path) -> bool:
    """Whether this is a folder of TileDB, or a file that names an experiment."""
    return (path / GROUP).is_file() if path.is_dir() else path.name.endswith(SUFFIX)


def open_soma(path: Path) -> SomaSource:
    """Open an experiment without reading its matrices.

    Raises
    ------
    UserError
        If tiledbsoma is not installed, it is no experiment, the file that names it is wrong, no cell is wanted, or it
        has no measurement or layer that can be read.
    """
    asked = {"experiment": str(path)} if path.is_dir() else _read_request(path)
    where, settings = str(asked["experiment"]), _settings(asked)
    with _opened(path, where, settings) as experiment:
        measurement = _measurement(path, list(experiment.ms.keys()) if "ms" in experiment else [], asked)
        found = experiment.ms[measurement]
        layers = _layers(path, measurement, found)
        obs, every = _obs(path, experiment, measurement, asked)
        var = found.var.read().concat().to_pandas().sort_values(JOIN, ignore_index=True)
        matrices = {}
        for name, layer in layers.items():
            array = found.X[layer]
            stored = int(array.nnz * len(obs) / max(every, 1))  # of some of the cells, about
            shape = (len(obs), len(var))
            matrices[name] = Matrix(
                shape, np.dtype(array.schema.field("soma_data").type.to_pandas_dtype()), "csr", stored
            )
    cells, genes = (frame.pop(JOIN).to_numpy(np.int64) for frame in (obs, var))
    obs.index, var.index = _index(obs, CELL_NAMES, cells, "cell"), _index(var, GENE_NAMES, genes, "gene")
    if "feature_name" in var:
        var = var.rename(columns={"feature_name": "symbol"})
    note = f"Of the experiment the measurement '{measurement}' is read, its layer '{layers.get('X', '')}' as X."
    notes = (note,) if (measurement, layers.get("X")) != (MEASUREMENT, LAYER) and "X" in layers else ()
    return SomaSource(
        path,
        "soma",
        obs,
        dict.fromkeys(matrices, var),
        matrices,
        notes=notes,
        where=where,
        measurement=measurement,
        layers=layers,
        cells=cells,
        genes=genes,
        settings=settings,
    )


def _read_request(path: Path) -> Mapping[str, Any]:
    """Read a file that names an experiment."""
    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error}).") from None
    if not isinstance(asked, dict) or not isinstance(asked.get("experiment"), str):
        raise UserError(f"{path}: has to say `experiment:`, the folder or address (s3://) of a SOMA experiment.")
    if wrong := [str(name) for name in asked if name not in KEYS]:
        raise UserError(f"{path}: there is no setting '{wrong[0]}'.{nearest(wrong[0], KEYS)}")
    kinds = {"cells": str, "measurement": str, "region": str, "anonymous": bool, "columns": list}
    for name, kind in kinds.items():
        if asked.get(name) is not None and not isinstance(asked[name], kind):
            said = {str: "a text", bool: "true or false", list: "a list of columns of obs"}[kind]
            raise UserError(f"{path}: {name} is {said}, not {asked[name]!r}.")
    if "://" not in asked["experiment"]:
        asked["experiment"] = str(path.parent / asked["experiment"])
    return asked


def _settings(asked: Mapping[str, Any]) -> dict[str, str]:
    settings = {"vfs.s3.region": asked["region"]} if asked.get("region") else {}
    return {**settings, "vfs.s3.no_sign_request": "true"} if asked.get("anonymous") else settings


@contextlib.contextmanager
def _opened(path: Path, where: str, settings: Mapping[str, str]) -> Iterator[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its libraries remark on as they are loaded
            import tiledbsoma  # an extra
    except ModuleNotFoundError:
        raise UserError(f"{path}: SOMA experiments need tiledbsoma: pip install 'bgen-flow[census]'.") from None
    context = tiledbsoma.SOMATileDBContext(tiledb_config=dict(settings))
    try:
        experiment = tiledbsoma.Experiment.open(where, context=context)
    except tiledbsoma.DoesNotExistError:
        raise UserError(f"{path}: there is no SOMA experiment at {where}.") from None
    except tiledbsoma.SOMAError as error:
        if "not a SOMAExperiment" in str(error):
            raise UserError(f"{path}: {where} is no SOMA experiment{_within(tiledbsoma, where, context)}.") from None
        raise UserError(f"{path}: the SOMA experiment {where} cannot be read ({error}).") from None
    with experiment:
        yield experiment


def _within(library: Any, where: str, context: Any) -> str:
    """Say what a group that is no experiment holds."""
    try:
        with library.open(where, context=context) as item:
            names = ", ".join(map(str, list(item.keys())[:8]))
            return f", but a {item.soma_type.removeprefix('SOMA').lower()} that holds {names or 'nothing'}"
    except Exception:  # what it is cannot be told
        return ""


def _measurement(path: Path, there: list[str], asked: Mapping[str, Any]) -> str:
    """Return the measurement to read."""
    named = asked.get("measurement")
    if named is not None and named not in there:
        raise UserError(f"{path}: the experiment has no measurement '{named}'.{nearest(named, there)}")
    if named is None and MEASUREMENT not in there and len(there) != 1:
        raise UserError(
            f"{path}: the experiment has the measurements {', '.join(there) or 'none'}, none of them '{MEASUREMENT}'."
            f" Name one in a file NAME{SUFFIX}, `measurement:`."
        )
    return str(named or (MEASUREMENT if MEASUREMENT in there else there[0]))


def _layers(path: Path, measurement: str, found: Any) -> dict[str, str]:
    """Return the layer that each matrix is."""
    there = list(found.X.keys()) if "X" in found else []
    if not there:
        raise UserError(f"{path}: the measurement '{measurement}' has no X, so there are no counts.")
    if dense := [name for name in there if found.X[name].soma_type != "SOMASparseNDArray"]:
        there = [name for name in there if name not in dense]
        if not there:
            raise UserError(f"{path}: layer '{dense[0]}' of '{measurement}' is dense. Write it as a sparse array.")
    main = LAYER if LAYER in there else there[0] if len(there) == 1 else None
    return {"X" if name == main else f"layers/{name}": name for name in there}


def _obs(path: Path, experiment: Any, measurement: str, asked: Mapping[str, Any]) -> tuple[pd.DataFrame, int]:
    """Return annotation of the cells that are wanted, in order of their numbers, and how many the experiment has."""
    import tiledbsoma  # an extra

    there = [name for name in list(experiment.obs.keys()) if name != JOIN]
    columns = asked.get("columns")
    if wrong := [str(name) for name in columns or () if name not in there]:
        raise UserError(f"{path}: obs of the experiment has no column '{wrong[0]}'.{nearest(wrong[0], there)}")
    named = [name for name in CELL_NAMES if name in there][:1]
    names = None if columns is None else list(dict.fromkeys([JOIN, *named, *columns]))
    text = asked.get("cells")
    try:
        query = tiledbsoma.AxisQuery(value_filter=text) if text else None
        with experiment.axis_query(measurement, obs_query=query) as wanted:
            obs = wanted.obs(column_names=names).concat().to_pandas()
    except (tiledbsoma.SOMAError, ValueError, SyntaxError, KeyError) as error:
        raise UserError(
            f"{path}: `cells: {text}` cannot be understood ({error}). Columns: {', '.join(there)}."
        ) from None
    if text and obs.empty:
        raise UserError(f"{path}: no cell of the experiment is one of `cells: {text}`.")
    for name in obs.select_dtypes("category"):
        obs[name] = obs[name].cat.remove_unused_categories()
    obs = obs if names is None else obs[names]  # the columns of the filter come, too
    return obs.sort_values(JOIN, ignore_index=True), int(experiment.obs.count)


def _index(frame: pd.DataFrame, names: tuple[str, ...], numbers: NDArray[np.int64], what: str) -> pd.Index:
    """Return texts that name cells or genes, taken out of the frame if it has them."""
    name = next((name for name in names if name in frame), None)
    return pd.Index(frame.pop(name).astype(str) if name else [f"{what}_{number}" for number in numbers], name=None)

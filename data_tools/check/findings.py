"""What a check found: findings, and the report that collects them for people, programs and the build."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bgen.names import shown
from bgen.notebooks import as_html
from data_tools.cells.texts import Texts
from data_tools.inputs.samples import Samples

Level = Literal["error", "warning", "fix", "info"]
LEVELS: dict[Level, str] = {"error": "bold red", "warning": "yellow", "fix": "cyan", "info": "dim"}
"""Levels, gravest first, and their colours. "fix" is something that the build mends and reports."""

Rounding = Literal["none", "nearest", "stochastic"]


FILE_COLUMN = "file"
"""obs column of the input file of each cell, where barcodes do not tell cells apart."""


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes
    ----------
    id
        "C01" ... "P01".
    level
        How grave it is.
    message
        What is wrong, and the fix.
    where
        File, or empty where it concerns all files.
    """

    id: str
    level: Level
    message: str
    where: str = ""


@dataclass
class Roles:
    """Which obs column plays which role; None where none does.

    ``condition`` may name several columns. ``control`` is the label of ``perturbation`` that means "not perturbed",
    and ``separator`` stands between the names of its labels (:mod:`data_tools.check.labels`); None: to be found.
    Units are words: "hours", "uM". ``detected`` names the roles that were not given but found.
    """

    cell_type: str | None = None
    batch: str | None = None
    donor: str | None = None
    condition: tuple[str, ...] = ()
    perturbation: str | None = None
    control: str | None = None
    separator: str | None = None
    time: str | None = None
    time_unit: str | None = None
    dose: str | None = None
    dose_unit: str | None = None
    population: str | None = None
    detected: tuple[str, ...] = ()

    def columns(self) -> dict[str, str]:
        """Return obs column to role, for the roles that are columns."""
        single = {
            column: role
            for role in ("cell_type", "batch", "donor", "perturbation", "time", "dose", "population")
            if (column := getattr(self, role))
        }
        return single | dict.fromkeys(self.condition, "condition")


@dataclass
class FileReport:
    """What was found of one file, and what the build needs of it. Axes: N its cells, M its columns.

    Attributes
    ----------
    path, kind, n_cells
        The file.
    cells
        The AnnData in memory that was checked instead of a file, or None.
    matrix
        Name of the matrix that holds the counts, empty where none was found.
    rounding
        How its values become integers: "none" (they are), "nearest" or "stochastic".
    gene_map
        int64 ``[M]``: number of the gene in :attr:`Report.genes` that a column is added to, -1 = left out.
    keep
        bool ``[N]``: cells to keep.
    library, detected_genes
        float64, int64 ``[N]``: total counts and genes seen of each cell, over the genes that are kept.
    obs
        Columns of obs (:func:`data_tools.cells.columns.compact`).
    values
        Facts about the matrix for the report: non-zeros, share of zeros, maximum, stored type.
    """

    path: Path
    kind: str
    n_cells: int
    cells: AnnData | None = None
    matrix: str = ""
    rounding: Rounding = "none"
    gene_map: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    keep: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    library: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    detected_genes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    values: dict[str, Any] = field(default_factory=dict)
    obs: pd.DataFrame = field(default_factory=pd.DataFrame)


@dataclass
class Report:
    """Everything that a check found.

    Attributes
    ----------
    files
        One report per file that could be opened, in the order given.
    findings
        All findings, in the order of the checks.
    genes
        Frame of the G final genes: index = ids, column ``symbol``.
    gene_cells
        int64 ``[G]``: how many of the kept cells express each gene (a gene merged from several columns counts a cell
        once per column).
    roles
        Roles common to all files.
    organism
        Latin name, "synthetic", or "unknown".
    shared_barcodes
        Whether a barcode occurs in several files, so that a store names cells by file, too.
    samples
        Table whose columns were added to obs; None: there was none.
    names
        Barcodes of all cells, file after file.
    """

    files: list[FileReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    genes: pd.DataFrame = field(default_factory=lambda: pd.DataFrame({"symbol": []}))
    gene_cells: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    roles: Roles = field(default_factory=Roles)
    organism: str = "unknown"
    shared_barcodes: bool = False
    samples: Samples | None = None
    names: Texts = field(default_factory=Texts, repr=False)

    @property
    def errors(self) -> list[Finding]:
        """Findings that have to be mended before a store can be built."""
        return [finding for finding in self.findings if finding.level == "error"]

    def add(self, id: str, level: Level, message: str, where: Path | str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(id, level, message, str(where)))

    def as_json(self) -> dict[str, Any]:
        """Return the report as what JSON can hold; arrays per cell and gene stay out."""
        return {
            "ok": not self.errors,
            "files": [
                {
                    "path": str(file.path),
                    "kind": file.kind,
                    "cells": file.n_cells,
                    "kept": int(file.keep.sum()),
                    "genes": len(file.gene_map),
                    "matrix": file.matrix,
                    "rounding": file.rounding,
                    **file.values,
                }
                for file in self.files
            ],
            "cells": sum(int(file.keep.sum()) for file in self.files),
            "genes": len(self.genes),
            "organism": self.organism,
            "roles": {
                **vars(self.roles),
                "condition": list(self.roles.condition),
                "detected": list(self.roles.detected),
            },
            "findings": [vars(finding) for finding in self.findings],
        }

    def __rich__(self) -> RenderableType:
        return Group(*self._parts())

    def __repr__(self) -> str:
        cells = sum(int(file.keep.sum()) for file in self.files)
        return f"<check of {cells:,} cells x {len(self.genes):,} genes: {len(self.errors)} errors>"

    def _repr_html_(self) -> str:
        return as_html(self)

    def print(self, console: Console | None = None) -> None:
        """Print the report as tables."""
        (console or Console()).print(self)

    def _parts(self) -> Iterable[RenderableType]:
        files = Table(title="Files", title_justify="left", title_style="bold")
        for name, justify in (("file", "left"), ("cells", "right"), ("genes", "right"), ("counts in", "left")):
            files.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for name in ("zeros", "counts per cell", "largest"):
            files.add_column(name, justify="right")
        for file in self.files:
            about = file.values
            files.add_row(
                Text(shown(file.path)),
                f"{file.n_cells:,}",
                f"{len(file.gene_map):,}",
                Text(shown(file.matrix or "-")),
                f"{about['zeros']:.1%}" if "zeros" in about else "-",
                f"{about['median_library']:,.0f}" if file.matrix and "median_library" in about else "-",
                f"{about['max']:,.6g}" if "max" in about else "-",
            )
        if self.files:
            yield files
            yield self._roles()
        if self.findings:
            table = Table(title="Findings", title_justify="left", title_style="bold", show_lines=True)
            table.add_column("check")
            table.add_column("level")
            table.add_column("finding", overflow="fold", ratio=1)
            order = list(LEVELS)
            several = len(({f.where for f in self.findings} | {str(file.path) for file in self.files}) - {""}) > 1
            for finding, files_of in sorted(self._once(), key=lambda pair: order.index(pair[0].level)):
                named = finding.where and (several or not self.files)
                where = f"{Path(finding.where).name}{_and_more(len(files_of) - 1)}: " if named else ""
                table.add_row(
                    finding.id, Text(finding.level, style=LEVELS[finding.level]), Text(shown(where + finding.message))
                )
            yield table
        yield self._verdict()

    def _once(self) -> list[tuple[Finding, list[str]]]:
        """Return each finding once, with the files that it was found of."""
        found: dict[tuple[str, str, str], tuple[Finding, list[str]]] = {}
        for finding in self.findings:
            key = finding.id, finding.level, finding.message
            found.setdefault(key, (finding, []))[1].append(finding.where)
        return list(found.values())

    def _roles(self) -> RenderableType:
        roles = self.roles
        table = Table(title="Columns", title_justify="left", title_style="bold")
        for name in ("role", "obs column", "found by"):
            table.add_column(name)
        details = {
            "perturbation": f" (control: {roles.control})" if roles.control else "",
            "time": f" in {roles.time_unit}",
            "dose": f" in {roles.dose_unit}",
        }
        for column, role in roles.columns().items():
            source = "its name" if role in roles.detected else "you"
            table.add_row(role, Text(shown(column + details.get(role, ""))), source)
        if not roles.columns():
            table.add_row("none", "", "")
        return table

    def _verdict(self) -> Text:
        number = {level: sum(f.level == level for f in self.findings) for level in LEVELS}
        if number["error"]:
            return Text(f"{plural(number['error'], 'error')} to mend; nothing can be built yet.", style="bold red")
        kept = sum(int(file.keep.sum()) for file in self.files)
        rest = [plural(number["warning"], "warning")] if number["warning"] else []
        rest += [plural(number["fix"], "fix", "fixes")] if number["fix"] else []
        text = f"Good to build: {kept:,} cells x {len(self.genes):,} genes, organism {shown(self.organism)}"
        return Text(text + (f" ({', '.join(rest)})." if rest else "."), style="bold green")


def _and_more(files: int) -> str:
    return f" and {plural(files, 'more file', 'more files')}" if files else ""


def plural(n: int, one: str, many: str = "") -> str:
    """Return a number with its noun: "1 error", "2 errors"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(values: Iterable[object], most: int = 5, n: int | None = None) -> str:
    """Return the first values, quoted where they are text, and how many more there are of ``n`` (default: given)."""
    values = list(values)
    n = len(values) if n is None else n
    shown = ", ".join(f"'{v}'" if isinstance(v, str) else str(v) for v in values[:most])
    return shown + (f" and {n - most:,} more" if n > most else "")

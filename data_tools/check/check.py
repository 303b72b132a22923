"""``bgen data check``: read every value of every file, and list everything that is wrong, each with its fix.

For ``bgen data build`` the same check decides which matrix holds the counts, which gene each column is, which cells are
kept, and which obs column plays which role.

Axes: N cells, M columns of a file, G final genes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from bgen.config.data import Access
from bgen.errors import UserError
from bgen.order.groups import parts
from bgen.store.format.columns import MAX_CATEGORIES
from data_tools.cells.columns import Joined, Table
from data_tools.cells.mapped import gathered, median
from data_tools.check.counts import MatrixStatistics, advice, describe, duplicate_groups, saturated
from data_tools.check.findings import FILE_COLUMN, FileReport, Report, Roles, Rounding, listed, plural
from data_tools.check.genes import Genes, MergeDuplicates, resolve_organism
from data_tools.check.look import Looked, Progress, counts_elsewhere, look
from data_tools.check.obs import resolve_roles
from data_tools.check.vocabulary import take_reference
from data_tools.inputs.fetch import on_this_machine
from data_tools.inputs.in_memory import NAME as IN_MEMORY
from data_tools.inputs.registry import members, open_source
from data_tools.inputs.samples import read_samples
from data_tools.inputs.source import Source

MANY_BARCODES, NEARLY_EMPTY = 500, 0.75
"""From so many barcodes on, of which so large a share is nearly empty, a matrix is taken for raw droplets (B04)."""

FEW_GENES = 5000
"""Below this, a file is taken for a selection of genes (G04)."""


@dataclass(frozen=True)
class CheckOptions:
    """What the user said about the files.

    Attributes
    ----------
    counts
        Matrix that holds the counts: "X", "raw/X", "layers/counts"; "auto": in each file the first that is counts;
        None: X, if it is counts.
    rounding
        What to do with values that are not integers: "none" refuses them, except numerical noise.
    gene_column
        Column of var with gene ids; None: its index.
    merge_duplicates
        "sum" adds up columns of the same gene; "no" makes them an error.
    accept_unnamed_genes
        Go on where the genes are only numbered.
    organism
        Overrides what the file declares.
    reference, floor
        Genes that the files are compared with (see :func:`data_tools.check.vocabulary.read_reference`), and the
        least share of them that the files together must have.
    samples
        Table of samples (:mod:`data_tools.inputs.samples`), whose columns are added to obs.
    primary_only
        Leave out cells that the file marks as copies of other datasets' (is_primary_data is False).
    roles
        Columns that the user named; others are looked for by name, "none" switches a role off.
    access
        How inputs at addresses are read.
    """

    counts: str | None = None
    rounding: Rounding = "none"
    gene_column: str | None = None
    merge_duplicates: MergeDuplicates = "no"
    accept_unnamed_genes: bool = False
    organism: str | None = None
    reference: Path | None = None
    floor: float = 0.0
    samples: Path | None = None
    primary_only: bool = False
    roles: Roles = field(default_factory=Roles)
    access: Access | None = None


@dataclass
class _Checked:
    """A file, while it is checked."""

    source: Source
    report: FileReport
    genes: Genes
    organism: str
    statistics: MatrixStatistics | None


def check(
    files: Sequence[str | os.PathLike[str] | AnnData],
    options: CheckOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """Check files of counts, or AnnData in memory, that are to become one store.

    Everything is read once, block by block. Faults of a file raise nothing: they are in the findings of the report, and
    :attr:`Report.errors` says whether a store can be built.

    Raises
    ------
    UserError
        If no file is given, or the table of samples cannot be read.
    """
    if not files:
        raise UserError("no file was given to check.")
    options = options or CheckOptions()
    report = Report(samples=None if options.samples is None else read_samples(options.samples))
    checked = []
    in_memory = [file for file in files if isinstance(file, AnnData)]
    named = [on_this_machine(file, options.access) for file in files if not isinstance(file, AnnData)]
    paths = dict.fromkeys(one for file in named for one in members(file))
    for given in (*paths, *in_memory):
        where = IN_MEMORY if isinstance(given, AnnData) else given
        before = len(report.names)
        try:
            source = open_source(given, report.names)
            if report.samples is not None:
                report.samples.join(source)
            checked.append(_check_file(source, options, report, progress))
        except UserError as error:
            report.names.cut(before)
            report.add("C01", "error", str(error).removeprefix(f"{where}: "), where)
            continue
        if isinstance(given, AnnData):
            report.files[-1].cells = given
    if not checked:
        return report
    _join_genes(checked, report)
    _check_reference(options, report)
    _check_cells(checked, report)
    _join_organisms(checked, report)

    obs = Joined([one.report.obs for one in checked], [one.report.keep for one in checked])
    uns = {key: value for one in reversed(checked) for key, value in one.source.uns.items()}
    report.roles = resolve_roles(options.roles, obs, uns, report.genes, report.add, len(checked))
    _check_common_units(checked, options.roles, report)
    _check_categories(obs, report)
    return report


def _check_file(source: Source, options: CheckOptions, report: Report, progress: Progress | None) -> _Checked:
    """Check the matrix and the genes of one file."""
    file = FileReport(
        source.path, source.kind, source.n_cells, keep=np.ones(source.n_cells, dtype=bool), obs=source.obs
    )
    for note in source.notes:
        report.add("C01", "info", note, source.path)
    looked = look(
        source,
        options.counts,
        gene_column=options.gene_column,
        merge_duplicates=options.merge_duplicates,
        accept_unnamed=options.accept_unnamed_genes,
        synthetic=(options.organism or source.uns.get("organism")) == "synthetic",
        progress=progress,
    )
    genes = looked.genes
    file.gene_map = genes.gene_map
    organism, about_organism = resolve_organism(options.organism, source.uns, source.obs, genes, str(source.path))
    _check_values(source, looked, options, file, report, progress)
    for finding in genes.findings:
        report.add(finding.id, finding.level, finding.message, source.path)
    report.findings += about_organism
    if options.primary_only and "is_primary_data" in source.obs:
        file.keep &= ~_is_false(source.obs["is_primary_data"])
    report.files.append(file)
    return _Checked(source, file, genes, organism, looked.statistics if file.matrix else None)


def _check_values(
    source: Source,
    looked: Looked,
    options: CheckOptions,
    file: FileReport,
    report: Report,
    progress: Progress | None,
) -> None:
    """Checks C01 to C06: decide whether the matrix is counts, and if not, where they are."""
    name, found = looked.matrix, looked.statistics
    about = source.matrices[name]
    file.values = {
        "nonzero": found.nonzero,
        "zeros": 1 - found.nonzero / (about.shape[0] * about.shape[1]),
        "min": found.minimum,
        "max": found.maximum,
        "median_library": median(len(found.library), found.library.__getitem__),
        "dtype": str(about.dtype),
        "layout": about.layout,
    }
    chosen = options.counts is not None or name == "X"
    if found.nonzero == 0:
        report.add("C01", "error", f"{name} holds no value other than 0.", source.path)
        return
    if found.usable and chosen:
        file.matrix = name
        file.library, file.detected_genes = found.library, found.detected
        if found.verdict == "near counts":
            file.rounding = "nearest"
            report.add("C02", "fix", f"{found.fractional:,} values of {name} differ from integers by at most "
                f"{found.off_by:.1g}: numerical noise, rounded.", source.path)  # fmt: skip
        if found.maximum >= 2**32:
            report.add(
                "C03", "error", f"{name} has a value of {found.maximum:.6g}: no count is that large.", source.path
            )
        if clipped := saturated(found):
            report.add("C05", "warning", f"{name}: {clipped}", source.path)
        return
    if chosen and found.verdict == "fractional" and options.rounding != "none":
        file.matrix, file.rounding = name, options.rounding
        file.library, file.detected_genes = found.library, found.detected
        report.add("C06", "warning", f"{found.fractional / found.nonzero:.0%} of the non-zero values of {name} are "
            f"fractional and are rounded ({options.rounding}), as you asked.", source.path)  # fmt: skip
        return

    id, message = "C01", f"there is no X; {name} is a candidate."
    if not found.usable:
        first = len(report.names) - source.n_cells
        id, message = describe(found, name, lambda cell: report.names[first + cell], source.var(name).index)
    elsewhere = counts_elsewhere(source, looked, progress)
    if elsewhere:
        fix = advice(elsewhere)
    elif found.corrected:
        fix = (
            "No counts were found elsewhere in the file. Use the uncorrected counts; if there are none, --round "
            "stochastic rounds each value up or down at random, keeping the means."
        )
    elif len(source.matrices) > 1:
        others = ", ".join(other for other in source.matrices if other != name)
        fix = f"{others} was read too and is not counts either. Use the file with raw counts."
    else:
        fix = "The file holds no other matrix. Use the one with raw counts."
    report.add(id, "error", f"{message} {fix}", source.path)


def _join_genes(checked: list[_Checked], report: Report) -> None:
    """Unite the genes of all files, in order of first appearance, and check them (G01, G02, G04)."""
    ids = checked[0].genes.ids
    for other in checked[1:]:
        ids = ids.append(other.genes.ids.difference(ids, sort=False))
    symbols = pd.Series(index=ids, dtype=object)
    cells = np.zeros(len(ids), dtype=np.int64)
    for one in checked:
        number = ids.get_indexer(one.genes.ids)
        fresh = symbols.iloc[number].isna().to_numpy()
        symbols.iloc[number[fresh]] = one.genes.symbols[fresh].to_numpy()
        kept = one.report.gene_map >= 0
        one.report.gene_map[kept] = number[one.report.gene_map[kept]]
        if one.statistics is not None:
            np.add.at(cells, one.report.gene_map[kept], one.statistics.column_cells[kept])
    report.genes, report.gene_cells = pd.DataFrame({"symbol": symbols.astype(str)}), cells

    if len({one.genes.system for one in checked}) > 1:
        systems = ", ".join(f"{one.source.path.name}: {one.genes.system}" for one in checked)
        report.add("G02", "error", f"the files name genes in different ways ({systems}). Use --gene-column so that all "
            "give the same kind of id.")  # fmt: skip
    elif len(checked) > 1:
        common = set(ids).intersection(*(one.genes.ids for one in checked))
        if len(common) < 0.5 * len(ids):
            report.add("G02", "warning", f"only {len(common):,} of {len(ids):,} genes are in every file. A gene that a "
                "file lacks counts as 0 there.")  # fmt: skip
    if all(one.statistics is not None for one in checked) and (unseen := int((cells == 0).sum())):
        report.add("G04", "warning", f"{unseen:,} of {len(ids):,} genes are 0 in every cell "
            f"({listed(ids[cells == 0], 3)}). They are kept.")  # fmt: skip
    for one in checked:
        _check_selection(one, report)


def _check_reference(options: CheckOptions, report: Report) -> None:
    """G02: the genes beside those that they are to be matched with, of a store, a model or a list."""
    if options.reference is None:
        return
    genes = pd.DataFrame({"id": report.genes.index.astype(str), "symbol": report.genes["symbol"].astype(str)})
    try:
        table, places = take_reference(genes.reset_index(drop=True), options.reference)
    except UserError as error:
        report.add("G02", "error", str(error))
        return
    share = len(np.unique(places[places >= 0])) / len(table)
    said = f"{share:.0%} of the {len(table):,} genes of {options.reference} are in the data"
    if share < options.floor:
        report.add("G02", "error", f"{said}, at least {options.floor:.0%} are needed; --floor lowers that.")
    else:
        report.add("G02", "info", f"{said}; {int((places < 0).sum()):,} genes of the data are not among them.")


def _check_selection(one: _Checked, report: Report) -> None:
    """G04: a selection of genes has library sizes that are not the cells'."""
    n_genes = len(one.genes.ids)
    if n_genes >= FEW_GENES or one.organism == "synthetic":
        return
    hint = "Use the file with all genes, if there is one."
    raw = one.source.matrices.get("raw/X")
    if raw is not None and raw.shape[1] > n_genes and one.report.matrix != "raw/X":
        hint = f"raw/X has {raw.shape[1]:,} genes: if it is counts, --counts raw/X."
    elif one.statistics is not None:
        for column, values in one.source.obs.items():
            is_number = pd.api.types.is_float_dtype(values) or pd.api.types.is_integer_dtype(values)
            if is_number and _is_total(values, one.statistics.library):
                hint += f" obs['{column}'] seems to hold the counts per cell over all genes."
                break
    report.add("G04", "warning", f"only {n_genes:,} genes: a selection? A cell's library size is then summed over "
        f"them, and not over all its molecules. {hint}", one.source.path)  # fmt: skip


def _is_total(values: pd.Series, library: NDArray[np.float64]) -> bool:
    """Whether these are counts over the whole genome: never below those of the genes at hand, and mostly above them."""
    n = len(library)

    def total(part: slice) -> NDArray[np.float64]:
        return values.iloc[part].to_numpy(np.float64)

    if not all(np.all(total(part) >= library[part] - 0.5) for part in parts(n)):
        return False
    return median(n, total) > 1.2 * median(n, library.__getitem__)


def _is_false(values: pd.Series) -> NDArray[np.bool_]:
    """Return which values of is_primary_data are False, or written so."""
    if pd.api.types.is_bool_dtype(values.dtype) and isinstance(values.dtype, np.dtype):
        return ~values.to_numpy()
    if isinstance(values.dtype, pd.CategoricalDtype):
        return np.append(values.array.categories.astype(str) == "False", False)[values.array.codes]
    return np.asarray(values.astype(str).to_numpy() == "False", bool)


def _check_cells(checked: list[_Checked], report: Report) -> None:
    """Checks B01 to B04."""
    edges = np.concatenate([[0], np.cumsum([one.source.n_cells for one in checked])])
    own = 0
    for one, start, stop in zip(checked, edges.tolist(), edges[1:].tolist(), strict=False):
        where, obs = one.source.path, one.source.obs
        repeated, distinct, first = report.names.repeated(slice(start, stop))
        own += repeated
        if repeated:
            examples = listed(first, 3, distinct)
            report.add("B03", "warning", f"{repeated:,} barcodes occur more than once ({examples}). The cells are kept "
                "apart by their row; make barcodes unique if you want to find them again.", where)  # fmt: skip
        if "is_primary_data" in obs:
            copies = int(_is_false(obs["is_primary_data"]).sum())
            left_out = not one.report.keep.all()
            if copies and left_out:
                report.add("B04", "fix", f"{copies:,} cells are copies of other datasets' (is_primary_data is False) "
                    "and are left out, as you asked.", where)  # fmt: skip
            elif copies:
                report.add("B04", "warning", f"{copies:,} cells are copies of other datasets' (is_primary_data is "
                    "False). Leave them out with --primary-only, or they count twice.", where)  # fmt: skip
        if one.statistics is not None:
            _check_libraries(one.statistics.library, one.report.keep, report, where)
    if len(checked) > 1:
        repeated, distinct, first = report.names.repeated(slice(0, len(report.names)))
        if shared := repeated - own:
            examples = listed(first, 3, distinct)
            report.add("B03", "fix", f"{shared:,} barcodes occur in several files ({examples}): cells are called "
                f"BARCODE-FILE in the store, and the column '{FILE_COLUMN}' names the file of each.")  # fmt: skip
            report.shared_barcodes = True
    statistics = [one.statistics for one in checked if one.statistics is not None]
    if statistics:
        nonempty = [found.detected > 0 for found in statistics]
        groups = duplicate_groups([found.fingerprint for found in statistics], nonempty)
        if (group := next(groups, None)) is not None:
            begins = edges[:-1][[one.statistics is not None for one in checked]]  # of files that have statistics
            before = np.concatenate([[0], np.cumsum([len(there) for there in nonempty])])
            file = np.searchsorted(before, group[:3], side="right") - 1
            some = [report.names[int(begins[f] + cell - before[f])] for f, cell in zip(file, group, strict=False)]
            example = listed(some, 3, len(group))
            extra = len(group) - 1 + sum(len(other) - 1 for other in groups)
            report.add("B02", "warning", f"{plural(extra, 'cell has', 'cells have')} exactly the counts of another, "
                f"such as {example}. Across a split they leak; remove the copies.")  # fmt: skip
    if all(not one.report.keep.any() for one in checked):
        report.add("B01", "error", "no cell is left.")


def _check_libraries(library: NDArray[np.float64], keep: NDArray[np.bool_], report: Report, where: Path) -> None:
    """B01: empty cells leave ``keep`` (changed in place). B04: libraries far from the others'."""
    empty = library == 0
    if n_empty := int((empty & keep).sum()):
        report.add("B01", "fix", f"{plural(n_empty, 'cell has', 'cells have')} no counts: left out.", where)
        keep &= ~empty
    if _looks_unfiltered(library, keep, report, where):
        return
    if keep.sum() < 20:
        return
    logs = gathered(len(library), lambda part: np.log(library[part][keep[part]]))
    middle = np.float64(median(len(logs), logs.__getitem__))
    spread = max(1.4826 * median(len(logs), lambda part: np.abs(logs[part] - middle)), 0.2)
    low, high = int((logs < middle - 5 * spread).sum()), int((logs > middle + 5 * spread).sum())
    least, most = (of(library, where=keep, initial=at) for of, at in ((np.min, np.inf), (np.max, 0)))
    if low + high:
        few = f"{plural(low, 'cell has', 'cells have')} very few counts (down to {least:,.0f})"
        many = f"{plural(high, 'cell has', 'cells have')} very many counts (up to {most:,.0f})"
        report.add("B04", "warning", f"{' and '.join([few] * (low > 0) + [many] * (high > 0))}, beside a median of "
            f"{np.exp(middle):,.0f}: debris or doublets? They are kept; filter them if they are.", where)  # fmt: skip


def _looks_unfiltered(library: NDArray[np.float64], keep: NDArray[np.bool_], report: Report, where: Path) -> bool:
    """B04: most barcodes of a raw matrix are droplets without a cell; their few molecules are of the fluid."""
    if len(library) < MANY_BARCODES:
        return False
    spare = gathered(len(library), library.__getitem__)
    best = float(np.quantile(spare, 0.999, overwrite_input=True))  # of cells, where there are any
    nearly = library < max(0.02 * best, 2)
    if nearly.mean() < NEARLY_EMPTY or best < 100:
        return False
    cells = int((library >= 0.1 * best).sum())
    least = max(0.02 * best, 2)
    report.add("B04", "warning", f"{nearly.mean():.0%} of the {len(library):,} barcodes hold next to nothing (fewer "
        f"than {least:,.0f} counts, where the largest hold {best:,.0f}): these are raw droplets, most of them "
        f"without a cell. Use the filtered matrix (filtered_feature_bc_matrix), or call cells first (CellRanger, "
        f"EmptyDrops, CellBender); by their counts alone about {cells:,} are cells.", where)  # fmt: skip
    return True


def _join_organisms(checked: list[_Checked], report: Report) -> None:
    known = sorted({one.organism for one in checked if one.organism != "unknown"})
    if len(known) > 1:
        each = ", ".join(f"{one.source.path.name}: {one.organism}" for one in checked)
        report.add("G03", "error", f"the files are of several organisms ({each}). Build one store per organism.")
    report.organism = known[0] if known else "unknown"


def _check_categories(obs: Table, report: Report) -> None:
    """O01: a column with more texts than a store keeps as categories would lose its role without a word."""
    roles = report.roles
    for column, role in roles.columns().items():
        values = obs[column]
        if pd.api.types.is_numeric_dtype(values) or (n := values.nunique()) <= MAX_CATEGORIES:
            continue
        said = (
            f"obs['{column}'] has {n:,} different texts, and a store keeps at most {MAX_CATEGORIES:,} of a column: it"
            f" cannot be the {role.replace('_', ' ')}."
        )
        if role not in roles.detected:
            report.add("O01", "error", f"{said} Name another column, or --{role.replace('_', '-')} none.")
            continue
        report.add("O01", "warning", f"{said} It is left unused.")
        if role == "condition":
            roles.condition = tuple(one for one in roles.condition if one != column)
        else:
            setattr(roles, role, None)
        if role == "perturbation":
            roles.control = None


def _check_common_units(checked: list[_Checked], given: Roles, report: Report) -> None:
    """O01: times and doses of several files must be in one unit, unless the user says which."""
    for role in ("time", "dose"):
        units = {one.source.uns.get(f"{role}_unit") for one in checked}
        if len(units) > 1 and getattr(report.roles, role) and not getattr(given, f"{role}_unit"):
            each = ", ".join(f"{one.source.path.name}: {one.source.uns.get(f'{role}_unit')}" for one in checked)
            report.add("O01", "error", f"the files do not declare the same {role} unit ({each}). Convert them to one "
                f"and say it with --{role}-unit.")  # fmt: skip

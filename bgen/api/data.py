"""``bgen.check`` and ``bgen.build``: from AnnData or files to a store that training reads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

from anndata import AnnData

from bgen.errors import UserError, nearest
from bgen.files import require_new_folder
from bgen.notebooks import progress_bar
from bgen.store.format.manifest import NAME as MANIFEST
from bgen.store.remote import is_remote
from bgen.store.store import Store
from bgen.version import __version__
from data_tools.building.build import build as write_store
from data_tools.check.check import CheckOptions
from data_tools.check.check import check as check_files
from data_tools.check.findings import Report, Roles, Rounding
from data_tools.check.genes import MergeDuplicates

Cells: TypeAlias = AnnData | str | PathLike[str]
"""AnnData in memory, or a file or folder of any format that ``bgen data check`` reads."""


class Looking(TypedDict, total=False):
    """How cells are looked at: the keyword arguments that :func:`check` and :func:`build` share.

    Attributes
    ----------
    counts
        Matrix of raw counts: "X" (default), "raw/X", "layers/counts", or "auto": the first that is counts.
    gene_column
        Column of var with the gene ids; default: its index.
    rounding
        What is done with values that are no integers: "none" (they are refused), "nearest" or "stochastic".
    merge_duplicates
        "sum" adds up columns of the same gene; "no" (default) makes them an error.
    accept_unnamed_genes
        Go on where genes are only numbered.
    organism
        Latin name; overrides what the data says.
    reference, floor
        File of gene ids that the store is to have, and the least share of them that the data must have.
    samples
        Table with a row for each file, its name first; the other columns are added to obs.
    primary_only
        Leave out cells that the data marks as copies.
    cell_type, batch, donor, condition, perturbation, control, separator, time, time_unit, dose, dose_unit, population
        obs columns that play these roles, where their names do not say so; "none" switches a role off. ``control`` is
        the perturbation that means none, ``separator`` stands between the names of a perturbation; units are words.
    """

    counts: str
    gene_column: str
    rounding: Rounding
    merge_duplicates: MergeDuplicates
    accept_unnamed_genes: bool
    organism: str
    reference: str | PathLike[str]
    floor: float
    samples: str | PathLike[str]
    primary_only: bool
    cell_type: str
    batch: str
    donor: str
    condition: str | Sequence[str]
    perturbation: str
    control: str
    separator: str
    time: str
    time_unit: str
    dose: str
    dose_unit: str
    population: str


def check(data: Cells | Sequence[Cells], **looking: Unpack[Looking]) -> Report:
    """Check that cells hold what training needs, and say for each fault what to do about it.

    Parameters
    ----------
    data
        AnnData, a file, or several that are to become one store.
    looking
        See :class:`Looking`.

    Returns
    -------
    Report
        A table of findings where it is shown or printed; ``errors`` are those that have to be mended.

    Raises
    ------
    UserError
        If an argument is wrong. Faults of the data raise nothing.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> report = bgen.check(simulate("tiny", seed=0))
    >>> report.errors
    []
    >>> report.roles.cell_type
    'cell_type'
    """
    return check_files(_several(data), _options(looking))


def build(
    data: Cells | Sequence[Cells],
    out: str | PathLike[str],
    *,
    splits: Mapping[str, float] | None = None,
    split_by: str | None = None,
    held_out: Mapping[str, Sequence[str]] | None = None,
    profile: str = "small",
    seed: int = 0,
    workers: int | None = None,
    restart: bool = False,
    progress: bool = True,
    **looking: Unpack[Looking],
) -> Store:
    """Check cells and write them into a store: shuffled, compressed, divided into splits, with checksums.

    A build that was killed goes on when it is called again with the same arguments.

    Parameters
    ----------
    data
        AnnData, a file, or several.
    out
        New folder.
    splits
        Split to its share of the cells; default: train 0.8, valid 0.1, test 0.1.
    split_by
        Column or role whose values are kept together in one split, such as donor; default: each cell by itself.
    held_out
        Split to the values of ``split_by`` that it consists of: ``{"test": ["48"]}``.
    profile
        "small" (for networks and disks) or "fast".
    workers
        Processes; default: as many as the input needs.
    restart
        Throw away what an interrupted build with other arguments left.
    progress
        Show a progress bar.
    looking
        See :class:`Looking`.

    Raises
    ------
    UserError
        If the check finds an error (all of them are named), an argument is wrong, or ``out`` is not empty.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> store = bgen.build(simulate("tiny", seed=0), "store", splits={"train": 0.7, "valid": 0.3}, progress=False)
    >>> sorted(store.manifest.splits)
    ['train', 'valid']
    """
    out = Path(out)
    require_new_folder(out)
    if profile not in ("small", "fast"):
        raise UserError(f"There is no profile '{profile}': choose small or fast.")
    options = _options(looking)
    report = check_files(_several(data), options)
    if report.errors:
        found = "\n".join(f"  {fault.where + ': ' if fault.where else ''}{fault.message}" for fault in report.errors)
        raise UserError(f"The data cannot be used yet:\n{found}")
    with progress_bar() if progress else nullcontext() as advance:
        write_store(
            report,
            out,
            created_by=f"bgen {__version__}",
            profile=profile,
            splits=None if splits is None else dict(splits),
            split_by=split_by,
            held_out=held_out,
            reference=options.reference,
            seed=seed,
            workers=workers,
            restart=restart,
            progress=advance,
        )
    return Store(out)


def _several(data: Cells | Sequence[Cells]) -> list[Cells]:
    return [data] if isinstance(data, AnnData | str | PathLike) else list(data)


def _options(looking: Mapping[str, Any]) -> CheckOptions:
    known = Looking.__annotations__
    if wrong := [name for name in looking if name not in known]:
        raise UserError(f"There is no argument '{wrong[0]}'.{nearest(wrong[0], known)}")
    roles = {name: looking[name] for name in Roles.__dataclass_fields__ if name in looking}
    if "condition" in roles:
        given = roles["condition"]
        roles["condition"] = (given,) if isinstance(given, str) else tuple(given)
    rest = {name: _path(name, value) for name, value in looking.items() if name not in roles}
    if "floor" in rest and "reference" not in rest:
        raise UserError("floor is a share of the genes of reference: give that, too.")
    return CheckOptions(roles=Roles(**roles), **rest)


def _path(name: str, value: Any) -> Any:
    return Path(value) if name in ("reference", "samples") else value


def store_for(data: Cells | Store, out: Path, *, progress: bool) -> str:
    """Return the address of the store that training reads: of cells in memory or in a file, a new one in ``out``.

    A store that an earlier call made of the same cells is taken again.

    Raises
    ------
    UserError
        As :func:`build`, or if the store that is there holds other cells.
    """
    if isinstance(data, Store):
        return str(data.folder)
    if not isinstance(data, AnnData | str | PathLike):
        raise UserError(f"Cells are AnnData, a file, or a store, not {type(data).__name__}.")
    if not isinstance(data, AnnData) and (is_remote(str(data)) or (Path(data) / MANIFEST).is_file()):
        return str(data)
    made, again = out / "store", out / "store-again"
    if not made.exists():
        build(data, made, progress=progress)
        return str(made)
    build(data, again, restart=True, progress=progress)
    try:
        same = Store(again).manifest.fingerprint == Store(made).manifest.fingerprint
    finally:
        shutil.rmtree(again)
    if not same:
        raise UserError(f"{made} was built from other cells. Choose another out, or give the store itself.")
    return str(made)

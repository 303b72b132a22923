"""Which obs column plays which role, and whether it is fit for it (checks O01 and P01).

A role is given by the user, or found by the column's name. Faults of a given role are errors. A role that was only
found never stops a build: it is left unused, with a warning that says how to use it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.errors import nearest
from bgen.store.format.columns import NAMED, is_whole
from data_tools.cells.columns import Table, count_texts, whole_as_categories
from data_tools.check.findings import Level, Roles, listed
from data_tools.check.labels import CONTROLS, alike, fold, read_grammar
from data_tools.check.quantities import Quantities, Quantity, dose_unit, read_quantities, time_unit

NAMES: dict[str, tuple[str, ...]] = {
    "cell_type": (
        "cell_type", "celltype", "cell_types", "celltypes", "cell_type_name", "cell_type_label", "cell_annotation",
        "cell_ontology_class", "annotation", "cell_line", "cell_name", "label", "labels", "cluster", "clusters",
        "leiden", "louvain", "seurat_clusters",
    ),
    "batch": (
        "batch", "batch_id", "gem_group", "gemgroup", "plate", "culture_plate", "library_id", "bio_rep", "replicate",
        "sample", "sample_id", "channel", "lane", "dataset_id", "orig.ident",
    ),
    "donor": ("donor_id", "donor", "patient", "patient_id", "individual", "subject", "subject_id", "mouse_id"),
    "perturbation": (
        "perturbation", "perturbations", "target_gene", "target", "gene_target", "guide_target", "perturbed_gene",
        "genetic_perturbation_id", "gene", "knockout",
    ),
    "condition": ("condition", "treatment", "drug", "drugname", "stim", "stimulation", "disease", "compound"),
    "time": (
        "time", "time_point", "timepoint", "embryo_time", "time_hours", "time_h", "hours", "hpf", "day", "days",
        "time_days", "minutes",
    ),
    "dose": ("dose", "dose_value", "dose_um", "dose_nm", "concentration", "conc", "dosage"),
    "population": ("population", "population_id"),
}  # fmt: skip
"""Role to usual column names, likeliest first: CELLxGENE, scPerturb, GEARS, cell-load, Tahoe-100M, CellFlow."""

MIN_CELLS = 10
"""A label with fewer cells cannot be learned or tested."""

Add = Callable[[str, Level, str], None]


def detect_roles(obs: Table) -> dict[str, Any]:
    """Return role to column for the roles that column names show; "condition" is a tuple of columns.

    Case and punctuation do not matter. "condition" is the perturbation where its labels are written as GEARS does
    ("ctrl", "A+ctrl") and no other column is. Times and doses are numbers, or texts that
    :func:`data_tools.check.quantities.read_quantities` reads.
    """
    by_name: dict[str, str] = {}
    for column in obs.columns:
        by_name.setdefault(fold(str(column)), str(column))
    found: dict[str, Any] = {}
    for role, names in NAMES.items():
        columns = list(dict.fromkeys(by_name[fold(name)] for name in names if fold(name) in by_name))
        if role in ("time", "dose"):
            columns = [c for c in columns if _is_quantity(obs[c], "time" if role == "time" else "dose")]
        elif role == "condition" and "perturbation" not in found and "condition" in by_name:
            labels = count_texts(obs[by_name["condition"]]).index
            if "ctrl" in labels or any(str(label).endswith("+ctrl") for label in labels):
                found["perturbation"] = by_name["condition"]
                columns.remove(by_name["condition"])
        if columns:
            found[role] = tuple(columns) if role == "condition" else columns[0]
    return found


def _is_quantity(values: pd.Series, what: Quantity) -> bool:
    """Whether a column holds times or doses: numbers, or texts that are read as such."""
    if pd.api.types.is_bool_dtype(values):
        return False
    if pd.api.types.is_numeric_dtype(values):
        return True
    found = read_quantities(values, what)
    return bool(found.read) and not found.wrong


def take_roles(obs: Table, columns: Mapping[str, str], units: Mapping[str, str]) -> Any:
    """Return obs as the roles of its columns want them, which is how a store has them.

    Times and doses that are written as text become numbers; whole numbers that name a cell type, a batch, a donor, a
    perturbation or a population become categories.

    Parameters
    ----------
    columns
        Role to column.
    units
        Unit of the time and of the dose.
    """
    changed: dict[str, Any] = {}
    for role, column in columns.items():
        values = obs[column]
        if role in ("time", "dose") and not pd.api.types.is_numeric_dtype(values):
            what: Quantity = "time" if role == "time" else "dose"
            changed[column] = read_quantities(values, what, units.get(role)).numbers
        elif role in NAMED and is_whole(values):
            changed[column] = whole_as_categories(values)
    return obs.assign(**changed) if changed else obs


def resolve_roles(
    given: Roles, obs: Table, uns: Mapping[str, Any], genes: pd.DataFrame, add: Add, n_files: int = 1
) -> Roles:
    """Decide all roles and check their columns; ``add(id, level, message)`` collects what is found.

    Parameters
    ----------
    given
        Roles as the user named them; "none" for a role that is not to be looked for.
    obs
        The columns common to all files, over all cells that are kept.
    uns
        Texts at the top of ``uns``: time_unit, dose_unit.
    genes
        Final genes (index = ids, column ``symbol``), which perturbed genes are looked up in.
    """
    roles, detected = Roles(), []
    found = detect_roles(obs)
    for role in NAMES:
        wanted = getattr(given, role)
        names = (wanted,) if isinstance(wanted, str) else wanted or ()
        if names and [name.lower() for name in names] == ["none"]:
            continue
        missing = [name for name in names if name not in obs]
        for name in missing:
            where = "obs has no" if n_files == 1 else "the files' obs have in common no"
            add("O01", "error", f"--{role.replace('_', '-')}: {where} column '{name}'.{nearest(name, obs.columns)}")
        if names and not missing:
            setattr(roles, role, tuple(names) if role == "condition" else names[0])
        elif not names and role in found:
            taken = roles.columns()
            value = tuple(c for c in found[role] if c not in taken) if role == "condition" else found[role]
            if value and value not in taken:
                setattr(roles, role, value)
                detected.append(role)
        elif not names and role in ("time", "dose"):
            _tell_of_unread(role, obs, roles.columns(), add)
    roles.detected = tuple(detected)
    for column, role in roles.columns().items():
        if role in ("time", "dose"):
            unit = _check_numbers(role, column, role in detected, given, obs, uns, add)
            setattr(roles, f"{role}_unit", unit)
            if unit is None:
                setattr(roles, role, None)
                roles.detected = tuple(other for other in roles.detected if other != role)
        else:
            _check_labels(role, column, role in detected, obs, add)
    _check_perturbation(roles, given, obs, genes, add)
    return roles


def _tell_of_unread(role: str, obs: Table, taken: Mapping[str, str], add: Add) -> None:
    """Say that a column is called like a time or dose, and why it is not taken for one."""
    by_name = {fold(str(column)): str(column) for column in reversed(obs.columns)}
    for name in NAMES[role]:
        column = by_name.get(fold(name))
        if column is None or column in taken or pd.api.types.is_bool_dtype(obs[column]):
            continue
        found = read_quantities(obs[column], "time" if role == "time" else "dose")
        if found.read:  # some are times or doses
            add("O01", "warning", f"'{column}' looks like a {role}, but is not used as one: {found.complaint()} cannot "
                f"be read as a {role}. Mend these texts (such as '24h', 'day 3', '10 uM'), or switch it off with "
                f"--{role} none.")  # fmt: skip
            return


def _check_labels(role: str, column: str, detected: bool, obs: Table, add: Add) -> None:
    missing = int(obs[column].isna().sum())
    if missing == len(obs):
        level: Level = "warning" if detected else "error"
        add("O01", level, f"{role} '{column}' has no value at all. Name another column or fill it.")
        return
    if missing:
        add("O01", "warning", f"{role} '{column}' has no value in {missing:,} cells: they are kept as unknown.")
    values = obs[column]
    if role in NAMED and is_whole(values):
        values = whole_as_categories(values)
        add("O01", "info", f"{role} '{column}' holds whole numbers: they are taken as names. If they are an amount, "
            f"switch the role off (--{role.replace('_', '-')} none) or give it as --condition {column}.")  # fmt: skip
    counts = count_texts(values)
    for pair in alike({str(label): int(n) for label, n in counts.items()}):
        add("O01", "warning", f"{role} '{column}': {pair}. Give them one name if they are one.")
    if len(counts) == 1:
        level = "info" if detected else "warning"
        add("O01", level, f"{role} '{column}' has one level, '{counts.index[0]}': there is nothing to tell apart.")
    few = counts[counts < MIN_CELLS]
    if len(counts) > max(0.5 * len(obs), MIN_CELLS):
        add(
            "O01",
            "warning",
            f"{role} '{column}' has {len(counts):,} levels in {len(obs):,} cells: is it an identifier?",
        )
    elif len(few):
        labels = listed([f"{label} ({n})" for label, n in few.items()])
        add("O01", "warning", f"{role} '{column}': fewer than {MIN_CELLS} cells of {labels}; too few to learn or test.")


def _check_numbers(
    role: str, column: str, detected: bool, given: Roles, obs: Table, uns: Mapping[str, Any], add: Add
) -> str | None:
    """Check a time or dose and return its unit, None if the column cannot be used."""
    what: Quantity = "time" if role == "time" else "dose"
    given_unit = getattr(given, f"{role}_unit")
    found = read_quantities(obs[column], what, given_unit)
    values = pd.Series(found.numbers, index=obs.index, copy=False)
    if found.wrong or pd.api.types.is_bool_dtype(obs[column]):
        example = "'24h', 'day 3' or 'E8.5'" if role == "time" else "'0' and '10 uM'"
        add("O01", "error", f"{role} '{column}' is not numbers: {found.complaint() or 'true and false'}. Write numbers "
            f"in one unit, or texts such as {example}.")  # fmt: skip
        return None
    if found.read:
        add("O01", "info", found.sentence(column))
    bad = int((~np.isfinite(values.to_numpy(np.float64))).sum())
    if bad:
        wrong = f"{role} '{column}' is NaN or infinite in {bad:,} cells"
        if detected:
            add("O01", "warning", f"{wrong}: the column is not used as {role}. Fill them and check again to use it.")
            return None
        hint = " A vehicle has dose 0." if role == "dose" else ""
        add("O01", "error", f"{wrong}. Fill them or remove the cells.{hint}")
    if role == "dose" and (values < 0).any():
        add("O01", "error", f"dose '{column}' is negative in {int((values < 0).sum()):,} cells.")
    if _has_one_value(found.numbers):
        level: Level = "info" if detected else "warning"
        add("O01", level, f"{role} '{column}' has one value, {values.iloc[0]:g}: there is nothing to learn from it.")
    unit = _unit(role, column, given, found, obs, uns)
    if unit is None:
        example = "hours" if role == "time" else "uM"
        if detected:
            add("O01", "warning", f"'{column}' looks like a {role} but has no unit, so it is not used. To use it: "
                f"--{role} {column} --{role}-unit {example}")  # fmt: skip
            return None
        add("O01", "error", f"{role} '{column}' has no unit: say it, such as --{role}-unit {example}.")
    return unit


def _has_one_value(numbers: NDArray[np.float64]) -> bool:
    """Whether all numbers are the same one, apart from NaN."""
    known = ~np.isnan(numbers)
    if not known.any():
        return False
    return bool(((numbers == numbers[np.argmax(known)]) | ~known).all())


def _unit(role: str, column: str, given: Roles, found: Quantities, obs: Table, uns: Mapping[str, Any]) -> str | None:
    """Return a unit: given, else in the texts, in uns, in an obs column "<role>_unit", or in the column's name."""
    named = getattr(given, f"{role}_unit") or found.unit or uns.get(f"{role}_unit")
    if named is None and f"{role}_unit" in obs and obs[f"{role}_unit"].dropna().nunique() == 1:
        named = obs[f"{role}_unit"].dropna().iloc[0]
    if named is not None:
        return (time_unit(str(named)) or str(named)) if role == "time" else str(named)
    last = re.split(r"[_\s.]+", column.lower())[-1]
    if role == "dose":
        return dose_unit(last) if last in ("um", "nm", "mm", "pm") else None
    return time_unit(last)


def _check_perturbation(roles: Roles, given: Roles, obs: Table, genes: pd.DataFrame, add: Add) -> None:
    """Find the control label, say how labels are read, and look the perturbed genes up (P01)."""
    if roles.perturbation is None:
        if given.control:
            add("P01", "error", "--control needs the column that holds it: --perturbation COLUMN.")
        return
    values = obs[roles.perturbation]
    labels = count_texts(whole_as_categories(values) if is_whole(values) else values)
    top = listed([f"{label} ({n:,})" for label, n in labels.items()])
    guesses = {fold(label): str(label) for label in reversed(labels.index)}
    control = given.control or next((guesses[fold(name)] for name in CONTROLS if fold(name) in guesses), None)
    if control is None or control not in labels.index:
        asked = f"'{control}' is not a label of '{roles.perturbation}'" if control else "no control label was found"
        hint = nearest(control, labels.index) if control and len(labels) > 20 else ""
        level: Level = "error" if given.control or "perturbation" not in roles.detected else "warning"
        fix = "Say which label means unperturbed: --control LABEL"
        add("P01", level, f"{asked}.{hint} Its most frequent labels: {top}. {fix} (or --perturbation none).")
        return
    roles.control = control
    known = set(genes.index) | set(genes["symbol"])
    grammar = read_grammar(map(str, labels.index), [control], given.separator, known)
    roles.separator = grammar.separator
    add("P01", "info", f"'{roles.perturbation}': {grammar.sentence({str(k): int(n) for k, n in labels.items()})}")
    neutral = set(map(fold, CONTROLS))
    others = [label for label in labels.index if not grammar.is_control(label) and fold(label) in neutral]
    if others:
        add("P01", "warning", f"'{roles.perturbation}': {listed([f'{name} ({labels[name]:,})' for name in others])} "
            f"also mean 'not perturbed' in most data, beside the control '{control}'. A store has one control label: "
            "give all controls that label if they are one.")  # fmt: skip
    targets = dict.fromkeys(
        part for label in labels.index for part in grammar.members(label) if fold(part) not in neutral
    )
    unknown = [target for target in targets if target not in known]
    if unknown and len(unknown) == len(targets):
        add("P01", "warning", f"none of the {len(unknown)} perturbations of '{roles.perturbation}' is a gene of the "
            f"data ({listed(unknown)}). They are names only: fine for drugs; for genes, check the naming.")  # fmt: skip
    elif unknown:
        add("P01", "warning", f"{len(unknown)} of {len(targets)} perturbed genes are not among the genes of the "
            f"data: {listed(unknown, 10)}. They are names only; their own expression cannot be compared.")  # fmt: skip

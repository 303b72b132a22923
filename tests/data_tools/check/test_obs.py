"""Columns of obs: found by name, checked, and never in the way unless the user asked for them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from data_tools.check.findings import Roles
from data_tools.check.obs import detect_roles, resolve_roles, take_roles
from data_tools.check.quantities import time_unit

N = 60
GENES = pd.DataFrame(
    {"symbol": ["TP53", "MYC", "GATA1"]}, index=["ENSG00000141510", "ENSG00000136997", "ENSG00000102145"]
)


def _obs(**columns: object) -> pd.DataFrame:
    return pd.DataFrame(columns, index=[f"c{i}" for i in range(N)])


def _resolve(given: Roles, obs: pd.DataFrame, uns: dict | None = None) -> tuple[Roles, list[tuple[str, str, str]]]:
    findings: list[tuple[str, str, str]] = []
    roles = resolve_roles(
        given, obs, uns or {}, GENES, lambda id, level, message: findings.append((id, level, message))
    )
    return roles, findings


HALVES = ["a", "b"] * (N // 2)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"celltype": HALVES, "subpop": HALVES}, {"cell_type": "celltype"}),
        ({"Cell Type": HALVES, "donor_id": HALVES}, {"cell_type": "Cell Type", "donor": "donor_id"}),
        (
            {"embryo_time": np.arange(N), "embryo_time_bin": HALVES, "batch": HALVES},
            {"batch": "batch", "time": "embryo_time"},
        ),
        ({"target_gene": HALVES, "gem_group": HALVES}, {"perturbation": "target_gene", "batch": "gem_group"}),
        ({"condition": ["ctrl", "TP53+ctrl"] * (N // 2)}, {"perturbation": "condition"}),
        ({"condition": HALVES, "drug": HALVES}, {"condition": ("condition", "drug")}),
        ({"dose_value": np.ones(N), "time": HALVES}, {"dose": "dose_value"}),
        ({"orig.ident": HALVES, "seurat_clusters": HALVES}, {"batch": "orig.ident", "cell_type": "seurat_clusters"}),
        ({"clusters": HALVES, "celltype": HALVES}, {"cell_type": "celltype"}),
        ({"clusters": HALVES}, {"cell_type": "clusters"}),
        ({"x": HALVES}, {}),
    ],
)
def test_detection(columns: dict, expected: dict) -> None:
    assert detect_roles(_obs(**columns)) == expected


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("h", "hours"),
        ("Hours", "hours"),
        ("minutes after first cleavage", "minutes"),
        ("dpf", "days"),
        ("x", None),
        ("", None),
    ],
)
def test_time_units(text: str, unit: str | None) -> None:
    assert time_unit(text) == unit


def test_given_columns_win_and_none_switches_off() -> None:
    obs = _obs(cell_type=HALVES, batch=HALVES, mine=HALVES)
    roles, findings = _resolve(Roles(cell_type="mine", batch="none"), obs)
    assert roles.columns() == {"mine": "cell_type"}
    assert roles.detected == ()
    assert findings == []


def test_unknown_column_names_the_nearest() -> None:
    _, findings = _resolve(Roles(batch="bach"), _obs(batch=HALVES))
    assert findings == [("O01", "error", "--batch: obs has no column 'bach'. Did you mean 'batch'?")]


def test_labels_missing_rare_single_or_identifiers() -> None:
    rare = ["a"] * (N - 3) + ["b"] * 3
    gaps = pd.Series(["a", None, "b"] * (N // 3), index=[f"c{i}" for i in range(N)])
    obs = _obs(cell_type=rare, batch=gaps, donor=["d"] * N, condition=[str(i) for i in range(N)])
    said = {f"{level}: {message}" for _, level, message in _resolve(Roles(), obs)[1]}
    assert any("fewer than 10 cells of 'b (3)'" in m for m in said)
    assert any("batch 'batch' has no value in 20 cells" in m for m in said)
    assert any(m.startswith("info: donor 'donor' has one level") for m in said)
    assert any("60 levels in 60 cells: is it an identifier?" in m for m in said)


def test_time_needs_a_unit_but_a_found_one_only_warns() -> None:
    obs = _obs(time=np.repeat([0.0, 24.0], N // 2))
    roles, findings = _resolve(Roles(), obs)
    assert roles.time is None
    assert roles.detected == ()
    assert findings[0][1] == "warning"
    assert "--time time --time-unit hours" in findings[0][2]
    _, findings = _resolve(Roles(time="time"), obs)
    assert findings[0][:2] == ("O01", "error")
    for given, uns in ((Roles(time_unit="h"), {}), (Roles(), {"time_unit": "hours"})):
        roles, findings = _resolve(given, obs, uns)
        assert (roles.time, roles.time_unit, findings) == ("time", "hours", [])
    roles, _ = _resolve(Roles(), _obs(day=np.repeat([0.0, 24.0], N // 2)))
    assert (roles.time, roles.time_unit) == ("day", "days")
    roles, _ = _resolve(Roles(), _obs(dose_value=np.repeat([0.0, 1.0], N // 2), dose_unit=["nM"] * N))
    assert (roles.dose, roles.dose_unit) == ("dose_value", "nM")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["10", "5 uM", "high", "low"], "not numbers: 'high' (15 cells), 'low' (15 cells)"),
        (["7*24", "0"], "not numbers: '7*24'"),
        ([np.nan, 1.0], "NaN or infinite in 30 cells. Fill them or remove the cells. A vehicle has dose 0."),
        ([-1.0, 1.0], "negative in 30 cells"),
    ],
)
def test_bad_doses(values: list, words: str) -> None:
    _, findings = _resolve(Roles(dose="dose", dose_unit="uM"), _obs(dose=(values * N)[:N]))
    assert findings[0][:2] == ("O01", "error")
    assert words in findings[0][2]


def test_control_is_found_given_or_missed() -> None:
    obs = _obs(target=["Non-Targeting", "TP53", "MYC+GATA1"] * (N // 3))
    roles, findings = _resolve(Roles(), obs)
    assert (roles.perturbation, roles.control, roles.separator) == ("target", "Non-Targeting", "+")
    assert [level for _, level, _ in findings] == ["info"]
    assert "3 names, in 1 combinations with '+' between (such as 'MYC+GATA1')" in findings[0][2]
    assert "controls: 'Non-Targeting' (20 cells)" in findings[0][2]
    roles, findings = _resolve(Roles(control="TP53"), obs)
    assert roles.control == "TP53"
    _, findings = _resolve(Roles(control="nontarget"), obs)
    assert findings[0][:2] == ("P01", "error")
    assert "'nontarget' is not a label of 'target'." in findings[0][2]
    assert "'Non-Targeting (20)'" in findings[0][2]
    _, findings = _resolve(Roles(control="x"), _obs(other=HALVES))
    assert "--perturbation COLUMN" in findings[0][2]
    without = _obs(target=["TP53", "MYC"] * (N // 2))
    assert _resolve(Roles(), without)[1][0][:2] == ("P01", "warning")
    assert _resolve(Roles(perturbation="target"), without)[1][0][:2] == ("P01", "error")


def test_perturbed_genes_are_looked_up() -> None:
    _, findings = _resolve(Roles(), _obs(target=["ctrl", "TP53", "NOTAGENE+ctrl"] * (N // 3)))
    assert "1 of 2 perturbed genes are not among the genes of the data: 'NOTAGENE'" in findings[1][2]
    _, findings = _resolve(Roles(), _obs(perturbation=["DMSO", "aspirin", "ibuprofen"] * (N // 3)))
    assert "none of the 2 perturbations" in findings[1][2]
    assert findings[1][1] == "warning"


def test_times_and_doses_as_text_are_read_with_their_units() -> None:
    obs = _obs(day=["day 0", "day 3", "7d"] * (N // 3), dose=["0", "10 uM", "500 nM"] * (N // 3))
    roles, findings = _resolve(Roles(), obs)
    assert (roles.time, roles.time_unit, roles.dose, roles.dose_unit) == ("day", "days", "dose", "nM")
    said = " ".join(message for _, _, message in findings)
    assert "The texts of obs['day'] are read as days: 'day 0' is 0, 'day 3' is 3, '7d' is 7." in said
    assert "'10 uM' is 10000" in said
    taken = take_roles(obs, {"time": "day", "dose": "dose"}, {"time": "days", "dose": "nM"})
    assert taken["day"].tolist()[:3] == [0, 3, 7]
    assert taken["dose"].tolist()[:3] == [0, 10000, 500]


def test_a_column_called_time_that_cannot_be_read_is_told() -> None:
    roles, findings = _resolve(Roles(), _obs(time=["24h", "48h", "late"] * (N // 3)))
    assert roles.time is None
    assert [level for _, level, _ in findings] == ["warning"]
    assert "'time' looks like a time, but is not used as one: 'late' (20 cells) cannot be read" in findings[0][2]


def test_whole_numbers_that_name_something_are_categories() -> None:
    obs = _obs(celltype=[0, 1, 2] * (N // 3), batch=[1.0, 2.0] * (N // 2), day=[0, 3] * (N // 2))
    roles, findings = _resolve(Roles(), obs)
    assert (roles.cell_type, roles.batch) == ("celltype", "batch")
    assert "cell_type 'celltype' holds whole numbers: they are taken as names" in findings[0][2]
    taken = take_roles(obs, {role: column for column, role in roles.columns().items()}, {"time": "days"})
    assert taken["celltype"].tolist()[:3] == ["0", "1", "2"]
    assert taken["batch"].tolist()[:2] == ["1", "2"]
    assert taken["day"].tolist()[:2] == [0, 3]


def test_labels_that_differ_only_by_case_or_spaces_are_told() -> None:
    obs = _obs(cell_type=["T cell"] * 30 + ["t  cell"] * 18 + ["B"] * 12, target=["ctrl", "TP53", "Ctrl"] * (N // 3))
    said = " ".join(message for _, level, message in _resolve(Roles(), obs)[1] if level == "warning")
    assert "'T cell' (30 cells) and 't  cell' (18 cells) differ only by case or spaces" in said
    assert "'Ctrl' (20 cells)" in said
    assert "also mean 'not perturbed'" in said

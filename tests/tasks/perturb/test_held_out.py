"""Held-out perturbations: compared within strata, checked before training, and no score loses a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import bgen
from bgen.errors import UserError
from bgen.tasks.finetune.finetune import Request, finetune
from bgen.tasks.load import Model
from bgen.tasks.perturb.baseline_rows import BaselineRows
from bgen.tasks.perturb.held_out import predict_held_out, split_rows, within_strata
from bgen.tasks.perturb.keys import screen_keys
from bgen.tasks.perturb.screen import Columns

QUICK = ["train.steps=2", "train.eval_every=2", "train.global_batch=64", "track.progress=false"]
COLUMNS = Columns("perturbation", "control", strata=["line"])


@pytest.fixture(scope="module")
def screen(demo: Any) -> anndata.AnnData:
    """Two cell lines that differ; one perturbation, the first gene, exists in line_b only."""
    cells = anndata.read_h5ad(demo.cells)
    label = cells.obs["perturbation"].astype(str).to_numpy()
    single = sorted({name for name in label if name != "control" and "+" not in name})
    rng = np.random.default_rng(0)
    line = rng.choice(["line_a", "line_b"], cells.n_obs)
    line[label == single[0]] = "line_b"
    counts = cells.X.toarray()
    counts[line == "line_b", :40] *= 5
    made = anndata.AnnData(counts.astype(np.float32), obs=cells.obs[["perturbation"]].copy(), var=cells.var.copy())
    made.obs["line"] = line
    made.uns["only_b"] = single[0]
    return made


@pytest.fixture(scope="module")
def tuned(demo: Any, screen: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A perturbation model of the screen, trained for two steps without line_b's own perturbation."""
    train, _ = split_rows(screen, COLUMNS, [screen.uns["only_b"]], 0)
    out = tmp_path_factory.mktemp("screen") / "out"
    request = Request("perturb", "head", columns=COLUMNS)
    finetune(demo.model, screen[train].copy(), out, request, overrides=QUICK, say=lambda _: None)
    return out / "model"


def test_held_out_cells_are_compared_with_controls_of_their_strata(
    demo: Any, tuned: Path, screen: anndata.AnnData
) -> None:
    model: Model = bgen.load(tuned)
    train, back = split_rows(screen, COLUMNS, [screen.uns["only_b"]], 0)
    kept = screen[back].copy()
    parts = model.read(screen[train].copy()), model.read(kept)
    [one] = predict_held_out(model, *parts, COLUMNS)
    of_line = kept[(kept.obs["perturbation"] == "control") & (kept.obs["line"] == "line_b")]
    assert one.control.shape[0] == of_line.n_obs
    assert abs(one.control - model.counts(of_line)).nnz == 0
    assert one.name == screen.uns["only_b"]
    assert list(one.baselines) == ["train mean", "train mean, by cells"]
    # Each predicted cell is its source, but for the effect.
    assert one.sources is not None
    off = np.abs(one.predicted - one.control[one.sources]).sum(1).mean()
    assert off < 0.5 * np.abs(one.predicted - one.control[np.roll(one.sources, 1)]).sum(1).mean()
    [pooled] = predict_held_out(model, *parts, Columns("perturbation", "control"))
    assert pooled.control.shape[0] == (kept.obs["perturbation"] == "control").sum()
    # The genes that set the lines apart respond as they did before the lines were set apart.
    apart = [model.genes.index(name) for name in screen.var_names[:40]]
    shift = [np.log(x.real[:, apart].sum(1).mean() / x.control[:, apart].sum(1).mean()) for x in (one, pooled)]
    plain, label = anndata.read_h5ad(demo.cells), screen.obs["perturbation"]
    before = [plain.X[(label == name).to_numpy(), :40].sum(1).mean() for name in (screen.uns["only_b"], "control")]
    truth = np.log(before[0] / before[1])
    assert abs(shift[0] - truth) < 0.2
    assert shift[1] - truth > 0.35


def test_controls_are_kept_back_in_every_stratum(screen: anndata.AnnData) -> None:
    _, back = split_rows(screen, COLUMNS, [screen.uns["only_b"]], 0)
    control = screen.obs["perturbation"] == "control"
    for line in ("line_a", "line_b"):
        here = (control & (screen.obs["line"] == line)).to_numpy()
        assert 0.2 < (back & here).sum() / here.sum() <= 0.5


def test_strata_have_the_proportions_of_the_perturbed_cells() -> None:
    perturbed, pool = np.repeat([0, 1], [30, 10]), np.repeat([0, 1, 2], [60, 60, 500])
    real, chosen = within_strata(perturbed, pool)
    assert len(real) == 40
    assert np.bincount(pool[chosen]).tolist() == [60, 20]
    real, chosen = within_strata(np.repeat([0, 1], [30, 10]), np.repeat([0, 2], [60, 9]))
    assert np.unique(perturbed[real]).tolist() == [0]  # no control cell of the other: its cells are not compared
    assert len(chosen) == 60
    assert [len(part) for part in within_strata(perturbed, np.repeat(0, 19))] == [0, 0]
    every = within_strata(np.zeros(7, int), np.zeros(50, int))
    assert [len(part) for part in every] == [7, 50]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("perturbation", "NOGENE", "cannot be predicted"), ("line", "line_c", "can be compared")],
)
def test_what_cannot_be_scored_is_told_before_training(
    demo: Any, screen: anndata.AnnData, tmp_path: Path, column: str, value: str, message: str
) -> None:
    """A target that the model does not know; a perturbation whose cell line has no control cells."""
    wrong = screen.copy()
    here = (wrong.obs["perturbation"] == screen.uns["only_b"]).to_numpy()
    wrong.obs[column] = np.where(here, value, wrong.obs[column].astype(str))
    held_out = value if column == "perturbation" else screen.uns["only_b"]
    request = Request("perturb", "head", columns=COLUMNS, hold_out=[held_out])
    with pytest.raises(UserError, match=f"--hold-out {held_out}: .*{message}"):
        finetune(demo.model, wrong, tmp_path / "out", request, overrides=QUICK, say=lambda _: None)
    assert not (tmp_path / "out" / "perturbation").exists()


def test_a_score_that_fails_loses_no_model(
    demo: Any, screen: anndata.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise UserError("no score today")

    monkeypatch.setattr("bgen.tasks.perturb.held_out.find_protocol", lambda _: type("P", (), {"evaluate": fails})())
    request = Request("perturb", "head", columns=COLUMNS, hold_out=[screen.uns["only_b"]])
    with pytest.raises(UserError, match=r"The model is trained and saved: .*no score today"):
        finetune(demo.model, screen, tmp_path / "out", request, overrides=QUICK, say=lambda _: None)
    assert bgen.load(tmp_path / "out" / "model").saved.about.perturbation.held_out is None


def test_the_models_own_control_label_chooses_the_controls(tuned: Path, screen: anndata.AnnData) -> None:
    model = bgen.load(tuned)
    name = model.saved.about.perturbation.perturbations[0]
    controls = int((screen.obs["perturbation"] == "control").sum())
    made = model.perturb(screen, name)
    assert made.n_obs == controls
    assert made.uns["bgen"]["controls"] == f"{controls:,} cells with obs['perturbation'] control"
    assert model.perturb(screen, name, control="all").n_obs == screen.n_obs
    with pytest.raises(UserError, match=r"No cell has the model's control label 'control'.*--control all"):
        model.perturb(screen[screen.obs["perturbation"] != "control"].copy(), name)
    bare = screen[:50].copy()
    del bare.obs["perturbation"]
    bare.obs["cell"] = "x"  # an obs column that is called as the index would be
    made = model.perturb(bare, name)
    assert made.uns["bgen"]["controls"] == "all 50 cells (no column says which of them are controls)"
    assert made.obs.index.name is None


def test_doses_and_several_controls_of_a_drug_screen(demo: Any, screen: anndata.AnnData, tmp_path: Path) -> None:
    drugs = screen[:, :].copy()
    rng = np.random.default_rng(1)
    drugs.obs["drug"] = rng.choice(["(+)-X", "(+)-X;Y", "Y", "None", "vehicle"], drugs.n_obs)
    drugs.obs["conc"] = rng.choice(["10 uM", "100 nM"], drugs.n_obs)
    drugs.obs.loc[drugs.obs["drug"].isin(["None", "vehicle"]), "conc"] = "0"
    columns = Columns("drug", ["None", "vehicle"], dose="conc")
    said: list[str] = []
    request = Request("perturb", "head", columns=columns)
    finetune(demo.model, drugs, tmp_path / "out", request, overrides=QUICK, say=said.append)
    told = " ".join(said)
    assert "2 names, in 1 combinations with ';' between" in told
    assert "'None' (" in told
    assert "are read as nM: '100 nM' is 100, '10 uM' is 10000" in told
    model = bgen.load(tmp_path / "out" / "model")
    about = model.saved.about
    assert about.perturbation.perturbations == ["(+)-X", "Y"]
    assert {row.dose for row in about.perturbation.effects} == {100, 10000}
    assert about.units["dose"] == "nM"
    made = model.perturb(drugs, "(+)-X;Y", dose="10 uM", n=30)
    assert set(made.obs["dose"]) == {10000}
    drugs.obs["conc"] = drugs.obs["conc"].replace({"10 uM": "a lot"})
    with pytest.raises(UserError, match=r"doses of perturbed cells that cannot be read: 'a lot' \("):
        finetune(demo.model, drugs, tmp_path / "x", request, overrides=QUICK, say=said.append)


def test_baselines_are_compared_within_strata() -> None:
    """Two lines that differ much, and a perturbation that does nothing but is mostly in the second."""
    rng = np.random.default_rng(0)
    line = np.repeat(["a", "b", "a", "b"], [200, 200, 20, 180])
    label = np.repeat(["control", "control", "p", "p"], [200, 200, 20, 180])
    shares = {"a": np.r_[np.full(5, 0.18), np.full(5, 0.02)], "b": np.r_[np.full(5, 0.02), np.full(5, 0.18)]}
    counts = sp.csr_matrix(rng.poisson([1000 * shares[one] for one in line]).astype(np.float32))
    cells = anndata.AnnData(counts, obs={"line": line, "perturbation": label})
    genes = pd.DataFrame({"id": [f"g{number}" for number in range(10)], "symbol": ""})

    def effect(columns: Columns) -> np.ndarray:
        rows = BaselineRows(cells, counts, screen_keys(cells, columns), columns, genes)
        return rows.rows((("p",), None), np.array([], np.int64), np.zeros(10))["same in training"]

    assert np.abs(effect(COLUMNS)).max() < 0.1
    assert np.abs(effect(Columns("perturbation", "control"))).max() > 0.3

"""Fine-tuning from a model directory to a model directory, for every task, and perturbation of control cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

import bgen
from bgen.config.load import load_finetune
from bgen.errors import UserError
from bgen.tasks.finetune.finetune import Request, finetune
from bgen.tasks.perturb.held_out import split_screen
from bgen.tasks.perturb.screen import Columns

QUICK = ["train.steps=10", "train.eval_every=5", "train.global_batch=64", "track.progress=false"]


@pytest.fixture(scope="module")
def cells(demo: Any) -> anndata.AnnData:
    return anndata.read_h5ad(demo.cells)


def tune(demo: Any, cells: anndata.AnnData, out: Path, request: Request, *more: str, parent: Any = None) -> list[str]:
    said: list[str] = []
    finetune(parent or demo.model, cells, out, request, overrides=[*QUICK, *more], say=said.append)
    return said


@pytest.fixture(scope="module")
def screen_model(bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A perturbation model, through the command line's own example."""
    out = tmp_path_factory.mktemp("tuned") / "my-model"
    done = bgen(
        *("finetune", demo.model, demo.cells, "--task", "perturb", "--perturbation", "perturbation"),
        *("--control", "control", "--within", "cell_type", "--mode", "head", "--out", out, *QUICK, "train.steps=40"),
    )
    assert done.code == 0, done
    return out / "model"


def test_new_batches_and_conditions_get_rows(demo: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    new = cells[:200].copy()
    new.obs["batch"] = "batch_new"
    new.obs["perturbation"] = "G0001x"
    said = tune(demo, new, tmp_path / "out", Request("generate"))
    assert any("New in batch: batch_new" in line for line in said)
    for run in ("vae", "flow"):
        config = load_finetune(tmp_path / "out" / run / "config.yaml")
        assert (config.stage, config.parent, config.flow.vae) == (run, demo.model, None)
    model = bgen.load(tmp_path / "out" / "model")
    parent = bgen.load(demo.model)
    made = model.generate(50, where={"perturbation": "G0001x"})
    assert (made.obs["perturbation"] == "G0001x").all()
    assert (made.obs["batch"] == "batch_new").all()
    assert model.saved.about.finetuning is not None
    about = model.saved.about.finetuning.parent
    assert about.fingerprint == parent.saved.fingerprint()
    assert about.name in (tmp_path / "out" / "model" / "README.md").read_text()
    # Old categories keep their codes.
    old = parent.saved.columns["batch"].categories
    assert model.saved.columns["batch"].categories[: len(old)] == old


def test_deeper_cells_are_generated_in_the_parents_latent_space(
    demo: Any, cells: anndata.AnnData, tmp_path: Path
) -> None:
    deep = cells[:200].copy()
    deep.X = deep.X * 20
    tune(demo, deep, tmp_path / "out", Request("generate"), "train.steps=60", "train.learning_rate=0.01")
    parent, model = bgen.load(demo.model), bgen.load(tmp_path / "out" / "model")
    # What flows is whitened by the parent's statistics: the flow would else start in another space.
    assert np.array_equal(parent.saved.vae.latent_mean, model.saved.vae.latent_mean)
    totals = [np.median(np.asarray(x.X.sum(1))) for x in (deep, model.generate(300), cells)]
    assert totals[1] > 3 * totals[2]


@pytest.mark.parametrize("mode", ["lora", "head"])
def test_modes_train_less_than_all(demo: Any, cells: anndata.AnnData, tmp_path: Path, mode: Any) -> None:
    tune(demo, cells[:200].copy(), tmp_path / "out", Request("generate", mode))
    before, after = (bgen.load(path).saved.module.state_dict() for path in (demo.model, tmp_path / "out" / "model"))
    assert before.keys() == after.keys()  # low-rank changes were added to the weights
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert any(name.startswith("backbone.head") for name in changed) == (mode == "head")
    assert "vae.encoder.weight" not in changed
    assert any(name.startswith("vae.decoder.blocks") for name in changed) == (mode == "lora")


def test_new_genes_are_added_or_left_out(demo: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    renamed = cells[:200].copy()
    # without symbols, which would tell that the new genes are old ones
    renamed.var = pd.DataFrame(index=[*renamed.var_names[:110], *[f"NEW{i}" for i in range(10)]])
    said = tune(demo, renamed, tmp_path / "left", Request("generate", "head"))
    assert "110 of the model's 120 genes are in the data (92%)." in said
    assert any("left out" in line for line in said)
    tune(demo, renamed, tmp_path / "added", Request("generate", "full", add_genes=True), "train.steps=60")
    model = bgen.load(tmp_path / "added" / "model")
    assert model.genes[-1] == "NEW9"
    made = model.generate(300)
    real, drawn = (np.asarray(x.X.sum(0)).ravel() for x in (renamed, made[:, renamed.var_names]))
    share_real, share_drawn = (x[110:].sum() / x.sum() for x in (real, drawn))
    assert share_drawn == pytest.approx(share_real, rel=0.25)
    with pytest.raises(UserError, match=r"110 of the 120 genes of the model.*--floor"):
        tune(demo, renamed, tmp_path / "x", Request("generate", floor=0.95))


@pytest.mark.parametrize("mode", ["full", pytest.param("lora", marks=pytest.mark.slow), "head"])
def test_an_annotator_learns_labels(demo: Any, cells: anndata.AnnData, tmp_path: Path, mode: Any) -> None:
    tune(demo, cells, tmp_path / "out", Request("annotate", mode, label="cell_type"), "train.steps=60")
    bare = cells.copy()
    del bare.obs["cell_type"]
    model = bgen.load(tmp_path / "out" / "model")
    told = model.annotate(bare, threshold=0.0)
    truth, best = cells.obs["cell_type"].astype(str), told.obs["cell_type_bgen"].astype(str)
    by_chance = f1_score(truth, np.random.default_rng(0).permutation(best), average="macro")
    assert f1_score(truth, best, average="macro") > by_chance + 0.15
    with pytest.raises(UserError, match="Give --label"):
        bgen.load(demo.model).annotate(bare)
    with pytest.raises(UserError, match="annotator model"):
        model.generate(3)


def test_perturbed_cells_keep_their_control(screen_model: Path, cells: anndata.AnnData) -> None:
    model = bgen.load(screen_model)
    name = model.saved.about.perturbation.perturbations[0]
    made = model.perturb(cells, name, control=("perturbation", "control"), seed=1)
    controls = cells[cells.obs["perturbation"] == "control"]
    assert made.n_obs == controls.n_obs
    assert (made.obs["control_cell"].to_numpy() == controls.obs_names.to_numpy()).all()
    assert (made.obs["cell_type"].astype(str) == controls.obs["cell_type"].astype(str).to_numpy()).all()
    assert np.array_equal(made.X.data, np.rint(made.X.data))
    again = model.perturb(cells, name, control=("perturbation", "control"), seed=1)
    assert abs(made.X - again.X).nnz == 0
    library = [np.log(np.asarray(x.X.sum(1)).ravel()) for x in (made, controls)]
    assert np.corrcoef(library)[0, 1] > 0.8
    own = model.counts(controls, None)
    assert abs(made.X - own).sum() < 0.5 * own.sum()  # other cells of the same expectations differ by more
    assert model.perturb(cells, name, n=1000).n_obs == 1000


def test_unseen_sets_and_targets_are_told(screen_model: Path, cells: anndata.AnnData) -> None:
    model = bgen.load(screen_model)
    first, second = model.saved.about.perturbation.perturbations[:2]
    pair = model.perturb(cells, f"{first}+{second}", n=50)
    assert list(pair.uns["bgen"]["unseen"]) == []
    other = next(gene for gene in model.genes if gene not in model.saved.about.perturbation.perturbations)
    assert list(model.perturb(cells, other, n=50).uns["bgen"]["unseen"]) == [other]


def test_perturb_as_in_its_example(bgen: Any, screen_model: Path, demo: Any, tmp_path: Path) -> None:
    name = json.loads((screen_model / "config.json").read_text())["about"]["perturbation"]["perturbations"][0]
    out = tmp_path / "cells.h5ad"
    asked = ["perturb", screen_model, demo.cells, "--control", "perturbation=control", "--perturbation"]
    done = bgen(*asked, name, "--out", out)
    assert done.code == 0, done
    assert anndata.read_h5ad(out).uns["bgen"]["perturbation"] == name
    for arguments, parts in (
        ([*asked, "G9999"], ["knows no perturbation 'G9999'", "trained on"]),
        ([*asked, name, "--dose", 3], ["without doses"]),
        ([*asked, "control"], ["is no perturbation"]),
        ([*asked[:4], "perturbation=contrl", "--perturbation", name], ["no control cells 'contrl'", "'control'"]),
        ([*asked[:4], "pert=control", "--perturbation", name], ["no column 'pert'"]),
        (["perturb", demo.model, demo.cells, "--perturbation", name], ["seen no perturbations", "--task perturb"]),
    ):
        result = bgen(*arguments, "--out", tmp_path / "x.h5ad")
        said = " ".join((result.err + result.out).split())
        assert result.code == 2, result
        for part in parts:
            assert part in said, said
    assert not (tmp_path / "x.h5ad").exists()


def test_held_out_perturbations_are_scored(bgen: Any, demo: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    labels = sorted(set(cells.obs["perturbation"].astype(str)) - {"control"})
    pair = next(label for label in labels if "+" in label)
    asked = ["finetune", demo.model, demo.cells, "--task", "perturb", "--perturbation", "perturbation"]
    asked += ["--control", "control", "--mode", "head", "--out", tmp_path / "out", *QUICK]
    wrong = bgen(*asked, "--hold-out", "G9")
    assert wrong.code == 2
    assert "no cell has the label 'G9'" in wrong.err
    done = bgen(*asked, "--hold-out", pair, "--hold-out", labels[0], "--json")
    assert done.code == 0, done
    scores = json.loads(done.out)["held_out"]
    assert sorted(scores["perturbations"]) == sorted([labels[0], pair])
    assert {"model", "control copy", "train mean", "ceiling"} <= set(scores["rows"])
    about = json.loads((tmp_path / "out/model/config.json").read_text())["about"]
    assert pair not in ["+".join(row["set"]) for row in about["perturbation"]["effects"]]
    assert "| control copy |" in (tmp_path / "out/model/README.md").read_text()
    page = (tmp_path / "out/report.html").read_text()
    assert scores["words"][0] in page
    assert scores["headline"] in page


def test_few_controls_are_shared_between_training_and_prediction(cells: anndata.AnnData) -> None:
    columns = Columns("perturbation", "control")
    control = np.flatnonzero(cells.obs["perturbation"] == "control")
    label = next(name for name in cells.obs["perturbation"] if name != "control")
    others = np.flatnonzero(cells.obs["perturbation"] != "control")
    few = cells[np.concatenate([control[:50], others])].copy()
    train, back = split_screen(few, columns, [label], 0)
    assert [(part.obs["perturbation"] == "control").sum() for part in (train, back)] == [25, 25]
    with pytest.raises(UserError, match=r"30 control cells; .* at least 40"):
        split_screen(few[20:].copy(), columns, [label], 0)


def test_mistakes_of_finetuning(bgen: Any, demo: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    for arguments, part in (
        ([demo.model, demo.cells, "--task", "dance"], "generate, annotate, perturb"),
        ([demo.model, demo.cells, "--task", "annotate"], "--label"),
        ([demo.model, demo.cells, "--task", "annotate", "--label", "type"], "no column 'type'"),
        ([demo.model, demo.cells, "--task", "perturb"], "--control"),
        (
            [demo.model, demo.cells, "--task", "perturb", "--perturbation", "perturbation", "--control", "none"],
            "no control cells 'none'",
        ),
        ([demo.vae / "model", demo.cells, "--task", "generate"], "needs a flow"),
        ([demo.model, demo.cells, "--task", "time", "--time", "nope"], "no column 'nope'"),
        ([demo.model, demo.cells, "--task", "time", "--time", "time", "--within", "nope"], "no column 'nope'"),
        ([demo.model, demo.cells, "--task", "generate", "--within", "nope"], "no column 'nope'"),
        ([demo.model, demo.cells, "--task", "annotate", "--label", "cell_type", "--time", "nope"], "no column 'nope'"),
        ([demo.model, demo.cells, "--task", "generate", "--hold-out", "G1"], "--hold-out is about --task perturb"),
        ([tmp_path, demo.cells, "--task", "generate"], "not a model directory"),
        ([demo.model, tmp_path / "x.h5ad", "--task", "generate"], "There is no file"),
    ):
        result = bgen("finetune", *arguments, *out, *QUICK)
        assert result.code == 2, result
        assert part in " ".join((result.err + result.out).split())
        assert not (tmp_path / "out" / "model").exists()
    with pytest.raises(UserError, match="20 cells"):
        tune(demo, cells[:20].copy(), tmp_path / "few", Request("generate"))
    single = cells[cells.obs["perturbation"] == "control"].copy()
    columns = Columns("perturbation", "control")
    with pytest.raises(UserError, match="nothing to learn from"):
        tune(demo, single, tmp_path / "single", Request("perturb", "head", columns=columns))

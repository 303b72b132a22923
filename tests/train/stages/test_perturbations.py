"""Training along perturbations on a store, and what the one directory that it exports answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from prefork import torchrun

from bgen.errors import UserError
from bgen.tasks.load import load_model
from bgen.tasks.perturb.query import ask
from bgen.tasks.perturb.screen import whitened_latents
from bgen.tasks.perturb.transport import transport
from bgen.track.record import read

QUIET = ["track.mlflow=false", "track.progress=false"]
FEW = ["train.steps=6", "train.eval_every=3", "train.log_every=1", "train.eval_cells=256", "train.checkpoint_every=3"]
PAIRS = ["flow.backbone={name: mlp, width: 32, layers: 1}", "data.trajectories={cells: 8, pool: 1024}"]
PAIRS += ["train.global_batch=128"]


@dataclass(frozen=True)
class Atlas:
    """Simulated screens in contexts, the store of most of them, and a VAE."""

    cells: anndata.AnnData
    store: Path
    vae: Path

    def arguments(self, out: Path, *more: str) -> list[str]:
        folders = [f"out={out}", f"data.store={self.store}", f"flow.vae={self.vae}"]
        return ["train", "perturbation", *folders, *QUIET, *FEW, *PAIRS, "flow.members.amount=dose", *more]


@pytest.fixture(scope="module")
def atlas(bgen: Any, tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    folder = tmp_path_factory.mktemp("atlas")
    held = ["--split-by", "cell_type", "--hold-out", "valid=line_14", "--hold-out", "test=line_15,line_16"]
    for arguments in (
        ["data", "simulate", "--preset", "atlas", "--cells", "3500", "--genes", "80", "--out", folder / "cells.h5ad"],
        ["data", "build", folder / "cells.h5ad", "--out", folder / "store", *held],
        ["train", "demo/vae", f"data.store={folder / 'store'}", f"out={folder / 'vae'}", "train.steps=20", *QUIET],
    ):
        made = bgen(*arguments)
        assert made.code == 0, made.err
    return Atlas(anndata.read_h5ad(folder / "cells.h5ad"), folder / "store", folder / "vae")


@pytest.fixture(scope="module")
def alone(bgen: Any, atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run: Path = tmp_path_factory.mktemp("alone") / "run"
    made = bgen(*atlas.arguments(run))
    assert made.code == 0, made.err
    assert len(losses(run)) == 6
    return run


def losses(run: Path, kind: str = "train") -> list[float]:
    return [row["loss"] for row in read(run / "record.jsonl") if row["kind"] == kind]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run / "model").saved.module.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_stages_give_the_same(zero: int, alone: Path, bgen: Any, atlas: Atlas, tmp_path: Path) -> None:
    made = bgen(*atlas.arguments(tmp_path / "run", f"train.zero={zero}"))
    assert made.code == 0, made.err
    for kind in ("train", "valid"):
        assert losses(tmp_path / "run", kind) == pytest.approx(losses(alone, kind), rel=1e-5)


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_two_ranks_give_the_same(zero: int, alone: Path, atlas: Atlas, tmp_path: Path) -> None:
    command = [*torchrun(2), "-m", "bgen", *atlas.arguments(tmp_path / "run", f"train.zero={zero}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for kind in ("train", "valid"):
        assert losses(tmp_path / "run", kind) == pytest.approx(losses(alone, kind), rel=1e-5)
    ours, theirs = weights(alone), weights(tmp_path / "run")
    for name in ("averages.general", "averages.control", "averages.own"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(alone: Path, bgen: Any, atlas: Atlas, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    shutil.rmtree(newest)
    then = bgen(*atlas.arguments(tmp_path / "run"), "--resume")
    assert then.code == 0, then.err
    assert [row["step"] for row in read(tmp_path / "run" / "record.jsonl") if row["kind"] == "train"][-3:] == [4, 5, 6]
    ours, theirs = weights(alone), weights(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_exported_directory_says_what_it_knows(alone: Path, atlas: Atlas) -> None:
    said = json.loads((alone / "model" / "config.json").read_text(encoding="utf-8"))
    facts = said["about"]["perturbation"]
    assert said["kind"] == "flow"
    labels = set(atlas.cells.obs["perturbation"]) - {"control"}
    assert facts["perturbations"] == sorted({name for label in labels for name in label.split("+")})
    assert facts["column"] == "perturbation"
    assert len(facts["contexts"]) == 13
    assert sorted({effect["dose"] for effect in facts["effects"]}) == pytest.approx([0.3, 1.0, 3.0])
    texts = [path.read_text(encoding="utf-8") for path in (alone / "model").glob("*.json")]
    assert not any(str(atlas.store.parent) in text for text in texts)


def test_it_answers_for_a_context_that_it_has_never_seen(alone: Path, atlas: Atlas) -> None:
    model = load_model(alone / "model")
    with pytest.raises(UserError, match="not to make cells from noise: use `bgen perturb`"):
        model.generate(5)
    mine = atlas.cells[(atlas.cells.obs["cell_type"] == "line_15").to_numpy()].copy()
    label = next(name for name in mine.obs["perturbation"].unique() if "+" in name)
    seen = model.perturb(mine, label, dose=3.0, seed=1)
    controls = int((mine.obs["perturbation"] == "control").sum())
    assert seen.n_obs == controls
    assert list(seen.uns["bgen"]["notes"]) == []
    assert (seen.X - mine[seen.obs["control_cell"].to_numpy(str)].X).nnz > 0
    assert np.array_equal(model.perturb(mine, label, dose=3.0, seed=1).X.data, seen.X.data)
    parts = [name for name in mine.obs["perturbation"].unique() if name != "control" and "+" not in name][:2]
    combined = model.perturb(mine, parts, dose=0.7)
    assert [note.split(" ", 1)[1] for note in combined.uns["bgen"]["notes"]][
        -1
    ] == "0.7 lies between those of training."
    unseen = next(name for name in mine.var_names if name not in model.saved.about.perturbation.perturbations)
    new = model.perturb(mine, unseen, dose="3 uM")
    assert list(new.uns["bgen"]["unseen"]) == [unseen]
    assert "most like" in new.uns["bgen"]["notes"][0]
    table = pd.DataFrame({"perturbation": [label, unseen], "dose": [3.0, 1.0]})
    both = model.perturb(mine, table, n=30)
    assert both.obs["query"].tolist() == [0] * 30 + [1] * 30
    assert list(both.uns["bgen"]["queries"]["1"]["unseen"]) == [unseen]
    alike = model.perturb(mine, label, dose=3.0, n=30)
    assert np.array_equal(both[:30].X.toarray(), alike[:, both.var_names].X.toarray())
    with pytest.raises(UserError, match=r"Row 2 of the table \(nobody\): The model knows no perturbation"):
        model.perturb(mine, pd.DataFrame({"perturbation": [label, "nobody"], "dose": [3.0, 1.0]}))
    with pytest.raises(UserError, match="The table has a column 'amount'"):
        model.perturb(mine, pd.DataFrame({"perturbation": [label], "amount": [3.0]}))


def test_perturbations_are_ranked_by_where_they_lead(alone: Path, atlas: Atlas) -> None:
    model = load_model(alone / "model")
    mine = atlas.cells[atlas.cells.obs["cell_type"].isin(["line_01", "line_02"]).to_numpy()].copy()
    ranked = model.screen(mine, ("cell_type", "line_02"), dose=3.0)
    labels = {str(name) for name in mine.obs["perturbation"].unique()} - {"control"}
    assert set(ranked["perturbation"]) == {"+".join(sorted(name.split("+"))) for name in labels}
    assert (np.diff(ranked["nearer"]) <= 0).all()
    assert ranked["nearer"].max() < 1
    assert ranked["seen"].all()
    unseen = next(name for name in mine.var_names if name not in labels)
    two = model.screen(mine, ("cell_type", "line_02"), dose=3.0, perturbations=[ranked["perturbation"][0], unseen])
    assert sorted(two["seen"]) == [False, True]
    nothing = mine[(mine.obs["perturbation"] == "control").to_numpy()].copy()
    nothing.obs["half"] = np.where(np.arange(nothing.n_obs) % 2, "a", "b")
    with pytest.raises(UserError, match="at least 20 are needed"):
        model.screen(nothing, ("half", "c"), dose=3.0)


def test_one_directory_answers_generate_perturb_interpolate_and_forecast(
    bgen: Any, atlas: Atlas, tmp_path: Path
) -> None:
    more = [
        "data.trajectories={times: 4, cells: 8, pool: 1024}",
        "flow.backbone={name: hybrid, width: 16, layers: 1, time: {scale: 24, tokens: 2}, attention: {heads: 2}}",
        "flow.backbone.mamba2={head_width: 8, state: 8}",
        "flow.patterns={noise: 1, forecast: 1, interpolate: 1, perturb: 1}",
        *["train.global_batch=256", "train.steps=2", "train.eval_every=2", "train.eval_cells=64"],
        "flow.endpoint=0.1",
        "flow.conditions=[cell_type]",
    ]
    made = bgen(*atlas.arguments(tmp_path / "run", *more))
    assert made.code == 0, made.err
    model = load_model(tmp_path / "run" / "model")
    label = model.saved.about.perturbation.perturbations[0]
    mine = atlas.cells[(atlas.cells.obs["cell_type"] == "line_03").to_numpy()].copy()
    perturbed = model.perturb(mine, label, dose=1.0, time=24.0)
    assert perturbed.n_obs == int((mine.obs["perturbation"] == "control").sum())
    where = {"cell_type": "line_03", "perturbation": label, "dose": 1.0}
    generated = model.generate(8, where=where)
    assert sorted(generated.obs["time"].unique()) == [6.0, 24.0, 72.0]
    assert generated.n_obs == 24
    course = mine[(mine.obs["perturbation"] == label).to_numpy()].copy()
    course.obs["dose"] = 1.0
    between = model.interpolate(course, 12.0, where=where, n=8)
    ahead = model.forecast(course[(course.obs["time"] < 72).to_numpy()].copy(), 72.0, where=where, n=8)
    assert between.n_obs == ahead.n_obs == 8
    assert between.X.sum() > 0
    with pytest.raises(UserError, match="Give the time since the perturbation"):
        model.perturb(mine, label, dose=1.0)


def test_a_plan_counts_what_members_add(bgen: Any, atlas: Atlas) -> None:
    plans = []
    for more in ([], ["flow.members=null"]):
        asked = [
            "plan",
            "perturbation",
            f"data.store={atlas.store}",
            f"flow.vae={atlas.vae}",
            "out=none",
            *PAIRS,
            *more,
        ]
        made = bgen(*asked, "--json")
        assert made.code == 0, made.err
        plans.append(json.loads(made.out))
    sizes = [sum(plan["parameters"].values()) for plan in plans]
    width, members = 32, 30
    assert sizes[0] - sizes[1] >= width * (members + 16)


def test_fine_tuning_goes_on_from_it_with_new_perturbations(
    alone: Path, atlas: Atlas, bgen: Any, tmp_path: Path
) -> None:
    parent = load_model(alone / "model")
    mine = atlas.cells[(atlas.cells.obs["cell_type"] == "line_16").to_numpy()].copy()
    labels = [name for name in mine.obs["perturbation"].unique() if name != "control" and "+" not in name]
    gone, kept = labels[0], labels[1:4]
    mine.obs["guide"] = mine.obs["perturbation"].astype(str).replace({kept[0]: "NEW", "control": "none"})
    mine = mine[mine.obs["guide"].isin(["none", "NEW", *kept[1:]]).to_numpy()].copy()
    mine.write_h5ad(tmp_path / "mine.h5ad")
    asked = ["--task", "perturb", "--perturbation", "guide", "--control", "none", "--dose", "dose", "--mode", "head"]
    few = ["train.steps=4", "train.eval_every=4", "track.progress=false"]
    made = bgen("finetune", alone / "model", tmp_path / "mine.h5ad", *asked, "--out", tmp_path / "out", *few)
    assert made.code == 0, made.err
    assert "New perturbations: NEW." in made.err
    tuned = load_model(tmp_path / "out" / "model")
    facts = tuned.saved.about.perturbation
    assert facts.perturbations == [*parent.saved.about.perturbation.perturbations, "NEW"]
    controls = mine[(mine.obs["guide"] == "none").to_numpy()].copy()
    for label in ("NEW", gone, kept[1]):
        cells = tuned.perturb(controls, label, dose=3.0, control="all")
        assert list(cells.uns["bgen"]["unseen"]) == []
        assert cells.n_obs == controls.n_obs
    before = parent.saved.module.averages.general
    rows = {(tuple(effect.set), effect.dose): row for row, effect in enumerate(facts.effects)}
    old = {(tuple(one.set), one.dose): row for row, one in enumerate(parent.saved.about.perturbation.effects)}
    key = next(key for key in old if key[0] == (gone,))
    known = tuned.saved.module.averages.general[rows[key]]
    assert np.corrcoef(known.numpy(), before[old[key]].numpy())[0, 1] > 0.5  # what the atlas knows of others stays
    plain = bgen(
        "finetune", alone / "model", tmp_path / "mine.h5ad", "--task", "generate", "--out", tmp_path / "g", *few
    )
    assert plain.code == 0, plain.err
    assert load_model(tmp_path / "g" / "model").perturb(controls, gone, dose=3.0, control="all").n_obs == controls.n_obs


def test_what_a_network_tells_is_exported_and_kept_by_fine_tuning(bgen: Any, atlas: Atlas, tmp_path: Path) -> None:
    genes = list(map(str, atlas.cells.var_names))
    edges = pd.DataFrame({"source": genes[:20], "target": genes[20:40], "weight": 1.0})
    edges.to_csv(tmp_path / "edges.csv", index=False)
    few = ["train.steps=2", "train.eval_every=2"]
    made = bgen(*atlas.arguments(tmp_path / "run", f"flow.members.network={tmp_path / 'edges.csv'}", *few))
    assert made.code == 0, made.err
    model = load_model(tmp_path / "run" / "model")
    facts = model.saved.about.perturbation
    assert facts.network.edges == 20
    assert len(model.saved.module.averages.network) == facts.network.components > 0
    mine = atlas.cells[(atlas.cells.obs["cell_type"] == "line_16").to_numpy()].copy()
    mine.write_h5ad(tmp_path / "mine.h5ad")
    asked = ["--task", "perturb", "--perturbation", "perturbation", "--control", "control", "--dose", "dose"]
    few += ["--mode", "head", "track.progress=false"]
    tuned = bgen("finetune", tmp_path / "run" / "model", tmp_path / "mine.h5ad", *asked, "--out", tmp_path / "t", *few)
    assert tuned.code == 0, tuned.err
    after = load_model(tmp_path / "t" / "model").saved
    assert after.about.perturbation.network == facts.network
    assert torch.equal(after.module.averages.network, model.saved.module.averages.network)


def test_labels_that_another_task_does_not_learn_are_unknown_to_it(
    alone: Path, atlas: Atlas, bgen: Any, tmp_path: Path
) -> None:
    mine = atlas.cells[(atlas.cells.obs["cell_type"] == "line_16").to_numpy()].copy()
    first = next(name for name in mine.obs["perturbation"].unique() if name != "control")
    mine.obs["perturbation"] = mine.obs["perturbation"].astype(str).replace({first: "SOMETHING"})
    mine.write_h5ad(tmp_path / "mine.h5ad")
    few = ["train.steps=2", "train.eval_every=2", "track.progress=false"]
    asked = ["finetune", alone / "model", tmp_path / "mine.h5ad", "--task", "generate", "--mode", "head"]
    made = bgen(*asked, "--out", tmp_path / "g", *few)
    assert made.code == 0, made.err
    model = load_model(tmp_path / "g" / "model")
    assert "SOMETHING" not in model.saved.columns["perturbation"].categories


def test_doses_of_fine_tuning_are_read_in_the_parents_unit(
    alone: Path, atlas: Atlas, bgen: Any, tmp_path: Path
) -> None:
    mine = atlas.cells[(atlas.cells.obs["cell_type"] == "line_16").to_numpy()].copy()
    mine.obs["dose"] = [f"{1000 * dose:g} nM" for dose in mine.obs["dose"]]
    mine.write_h5ad(tmp_path / "mine.h5ad")
    asked = ["--task", "perturb", "--perturbation", "perturbation", "--control", "control", "--dose", "dose"]
    few = ["--mode", "head", "train.steps=2", "train.eval_every=2", "track.progress=false"]
    made = bgen("finetune", alone / "model", tmp_path / "mine.h5ad", *asked, "--out", tmp_path / "t", *few)
    assert made.code == 0, made.err
    about = load_model(tmp_path / "t" / "model").saved.about
    assert about.units["dose"] == "uM"
    assert max(effect.dose for effect in about.perturbation.effects) == pytest.approx(3.0)
    mine.obs["dose"] = atlas.cells.obs["dose"].reindex(mine.obs_names) * 1000
    mine.uns["dose_unit"] = "nM"
    mine.write_h5ad(tmp_path / "numbers.h5ad")
    made = bgen("finetune", alone / "model", tmp_path / "numbers.h5ad", *asked, "--out", tmp_path / "n", *few)
    assert made.code == 2
    assert "holds doses in nM, and the model's are in uM" in " ".join(made.err.split())


def test_a_model_of_courses_is_not_fine_tuned_on_a_screen_without_times(
    alone: Path, atlas: Atlas, bgen: Any, tmp_path: Path
) -> None:
    shutil.copytree(alone / "model", tmp_path / "courses")
    file = tmp_path / "courses" / "config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    said["about"]["trajectories"]["times"] = 4
    file.write_text(json.dumps(said), encoding="utf-8")
    atlas.cells[:400].write_h5ad(tmp_path / "mine.h5ad")
    asked = ["--task", "perturb", "--perturbation", "perturbation", "--control", "control", "--dose", "dose"]
    made = bgen("finetune", tmp_path / "courses", tmp_path / "mine.h5ad", *asked, "--out", tmp_path / "t")
    assert made.code == 2
    assert "knows courses under perturbations" in " ".join(made.err.split())


def test_sets_are_ranked_whatever_separates_the_names_of_labels(alone: Path, atlas: Atlas, tmp_path: Path) -> None:
    shutil.copytree(alone / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    said["about"]["perturbation"]["separator"] = "|"
    file.write_text(json.dumps(said), encoding="utf-8")
    mine = atlas.cells[atlas.cells.obs["cell_type"].isin(["line_01", "line_02"]).to_numpy()].copy()
    ranked = load_model(tmp_path / "model").screen(mine, ("cell_type", "line_02"), dose=3.0)
    assert ranked["perturbation"].str.contains("+", regex=False).any()


def test_a_flow_that_learnt_to_start_from_noise_starts_from_noise(bgen: Any, atlas: Atlas, tmp_path: Path) -> None:
    noise = ["flow.source=noise", "flow.averages=false", "train.steps=1", "train.eval_every=0"]
    made = bgen(*atlas.arguments(tmp_path / "run", *noise))
    assert made.code == 0, made.err
    model = load_model(tmp_path / "run" / "model")
    mine = model.read(atlas.cells[(atlas.cells.obs["cell_type"] == "line_15").to_numpy()].copy())
    before = torch.from_numpy(whitened_latents(model, mine)[0])
    label = model.saved.about.perturbation.perturbations[0]
    moved = transport(model.saved, before, mine.columns, ask(model, label, 1.0).members)
    similar = torch.corrcoef(torch.stack([before.flatten(), moved.flatten()]))[0, 1]
    assert abs(similar) < 0.2

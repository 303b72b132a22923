"""What users do with a flow on log counts: every verb works, or says in one sentence why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

import bgen
from bgen.config.load import load_config
from bgen.errors import UserError
from bgen.models.log_counts import LogCounts

QUICK = ["train.steps=12", "train.eval_every=6", "track.mlflow=false", "track.progress=false"]
SMALL = ["flow.backbone.width=32", "train.global_batch=64"]


@pytest.fixture(scope="module")
def cells(demo: Any) -> anndata.AnnData:
    return anndata.read_h5ad(demo.cells)


@pytest.fixture(scope="module")
def direct(bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow on log counts; the configuration names a VAE that is not there, and it is not missed."""
    out = tmp_path_factory.mktemp("direct") / "flow"
    done = bgen("train", "demo/flow", f"out={out}", f"data.store={demo.store}", "flow.space=log_counts", *QUICK, *SMALL)
    assert done.code == 0, done.err
    assert "flow.vae=bgen-demo/vae is not used: flow.space=log_counts needs no VAE." in done.err
    assert "warning" not in done.err
    return out / "model"


@pytest.fixture(scope="module")
def over_time(bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("direct") / "course"
    done = bgen(
        *["train", "trajectories", f"out={out}", f"data.store={demo.store}", "flow.space=log_counts", "flow.vae=null"],
        "data.trajectories={system: [donor], times: 3, cells: 8}",
        "flow.backbone={name: hybrid, width: 32, layers: 1, time: {scale: 24.0, tokens: 2}, mamba2: {head_width: 16}}",
        *[*QUICK, "train.global_batch=96", "train.eval_every=0", "train.ema=0"],
    )
    assert done.code == 0, done.err
    return out / "model"


def test_a_latent_flow_needs_a_vae_and_this_one_none() -> None:
    with pytest.raises(UserError, match=r"flow\.space=log_counts"):
        load_config("flow", ["flow.vae=null"])
    assert load_config("flow", ["flow.vae=null", "flow.space=log_counts"]).flow.vae is None


def test_many_genes_are_warned_of(bgen: Any, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bgen.train.stages.flow.MOST_GENES", 100)
    settings = ["flow.space=log_counts", "flow.vae=null", "train.steps=1", "train.eval_every=0", *SMALL]
    done = bgen("train", "demo/flow", f"out={tmp_path / 'run'}", f"data.store={demo.store}", *QUICK, *settings)
    assert done.code == 0, done.err
    assert "warning: flow.space=log_counts makes a network with 120 inputs and outputs" in done.err
    assert "flow.vae" not in done.err


def test_the_directory_says_what_it_is(direct: Path, bgen: Any, tmp_path: Path) -> None:
    config = json.loads((direct / "config.json").read_text())
    assert "vae" not in config
    assert config["log_counts"] == {"scale": "one", "counts": "rounded"}
    assert "A rectified flow on the log counts of single cells, 120 genes" in (direct / "README.md").read_text()
    made = bgen("export", direct.parent, "--out", tmp_path / "model")
    assert made.code == 0, made.err
    first, second = (bgen_model(folder) for folder in (direct, tmp_path / "model"))
    assert first.saved.fingerprint() == second.saved.fingerprint()
    assert isinstance(first.saved.codec, LogCounts)
    config["n_genes"] = 119
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is not the gene table"):
        bgen_model(tmp_path / "model")


def bgen_model(folder: Path) -> Any:
    return bgen.load(folder)


def test_cells_are_generated(direct: Path) -> None:
    model = bgen_model(direct)
    made = model.generate(30, where={"cell_type": model.conditions["cell_type"][0]}, library_size=300, guidance=1.5)
    counts = made.X.toarray()
    assert np.array_equal(counts, counts.round())
    assert np.abs(counts.sum(1) - 300).max() < 60  # rounding
    assert np.array_equal(model.generate(30, seed=3).X.toarray(), model.generate(30, seed=3).X.toarray())


@pytest.mark.slow
def test_cells_are_scored(direct: Path, demo: Any, bgen: Any, tmp_path: Path) -> None:
    done = bgen("evaluate", direct, "--data", demo.store, "--out", tmp_path / "report", "--seeds", 2)
    assert done.code == 0, done.err


def test_what_needs_a_latent_space_says_that_there_is_none(direct: Path, demo: Any, bgen: Any, tmp_path: Path) -> None:
    message = "has no latent space: its flow runs on the log counts of all genes"
    for verb, more in {"embed": [], "denoise": [], "integrate": [], "annotate": ["--label", "cell_type"]}.items():
        done = bgen(verb, direct, demo.cells, "--out", tmp_path / "out.h5ad", *more)
        assert done.code == 2, verb
        assert message in " ".join(done.err.split()), verb
        assert "Traceback" not in done.err
    asked = ["--task", "annotate", "--label", "cell_type", "--out", tmp_path / "tuned"]
    done = bgen("finetune", direct, demo.cells, *asked)
    assert (done.code, message in " ".join(done.err.split())) == (2, True)
    done = bgen("train", "demo/flow", f"out={tmp_path / 'f'}", f"data.store={demo.store}", f"flow.vae={direct}")
    assert (done.code, message in " ".join(done.err.split())) == (2, True)


def test_states_are_log_counts_and_decode_to_the_counts(direct: Path, cells: anndata.AnnData) -> None:
    model = bgen_model(direct)
    read = model.read(cells[:50])
    state, variance = model.encode(read)
    assert not variance.any()
    counts = read.counts.toarray()
    library = counts.sum(1)
    np.testing.assert_allclose(state, np.log1p(1e4 * counts / library[:, None]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.decode(state, library.astype(np.float32)), counts, rtol=1e-3, atol=1e-3)


def test_time_points_are_generated_filled_in_and_forecast(over_time: Path, cells: anndata.AnnData) -> None:
    model = bgen_model(over_time)
    assert model.generate(20, steps=2).shape == (60, 120)
    assert model.interpolate(cells, 24.0, n=20, sample={"steps": 2}).shape == (20, 120)
    assert model.forecast(cells, 48.0, n=20, sample={"steps": 2}).shape == (20, 120)


def test_fine_tuning_trains_the_flow_alone(direct: Path, demo: Any, bgen: Any, tmp_path: Path) -> None:
    quick = ["train.steps=6", "train.eval_every=3", "train.global_batch=96", "track.progress=false"]
    done = bgen("finetune", direct, demo.cells, "--task", "generate", "--out", tmp_path / "more", *quick)
    assert done.code == 0, done.err
    assert "autoencoder" not in done.out
    assert not (tmp_path / "more" / "vae").exists()
    assert bgen_model(tmp_path / "more" / "model").generate(5).shape == (5, 120)
    few = anndata.read_h5ad(demo.cells)
    few.var_names = [f"new_{name}" if at < 3 else name for at, name in enumerate(few.var_names)]
    few.write_h5ad(tmp_path / "new.h5ad")
    asked = ["--task", "generate", "--add-genes", "--out", tmp_path / "genes", *quick]
    done = bgen("finetune", direct, tmp_path / "new.h5ad", *asked)
    assert done.code == 2
    assert "it takes no new ones" in " ".join(done.err.split())
    done = bgen("finetune", direct, demo.cells, "--task", "generate", "--out", tmp_path / "s", "flow.space=log_counts")
    assert done.code == 2
    assert "that of the parent" in " ".join(done.err.split())


def test_a_course_and_a_screen_are_learnt_on_log_counts(direct: Path, demo: Any, bgen: Any, tmp_path: Path) -> None:
    quick = ["train.steps=6", "train.eval_every=3", "train.global_batch=96", "track.progress=false"]
    course = ["--task", "time", "--time", "time", "--within", "donor", "--out", tmp_path / "course", *quick]
    done = bgen("finetune", direct, demo.cells, *course)
    assert done.code == 0, done.err
    assert bgen_model(tmp_path / "course" / "model").interpolate(demo.cells, 24.0, n=10).shape == (10, 120)
    screen = ["--task", "perturb", "--perturbation", "perturbation", "--control", "control", "--within", "cell_type"]
    done = bgen("finetune", direct, demo.cells, *screen, "--out", tmp_path / "screen", *quick)
    assert done.code == 0, done.err
    model = bgen_model(tmp_path / "screen" / "model")
    cells = anndata.read_h5ad(demo.cells)
    control = cells[cells.obs["perturbation"] == "control"][:60].copy()
    name = next(label for label in cells.obs["perturbation"].unique() if label != "control")
    made = model.perturb(control, name)[:, control.var_names]
    assert made.shape == (60, 120)
    before, after = control.X.toarray(), made.X.toarray()
    # each cell keeps most of its own counts, and a gene that it lacks can appear
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(before, after, strict=True)]) > 0.8
    assert ((before == 0) & (after > 0)).any()


def test_perturbations_of_a_store_are_learnt_on_log_counts(
    demo: Any, cells: anndata.AnnData, bgen: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = bgen(
        *["train", "perturbation", f"out={out}", f"data.store={demo.store}", "flow.space=log_counts", "flow.vae=null"],
        *["flow.backbone={name: mlp, width: 32, layers: 1}", "data.trajectories.cells=8", *QUICK, "train.eval_every=0"],
        "train.global_batch=64",
    )
    assert done.code == 0, done.err
    control = cells[cells.obs["perturbation"] == "control"][:40].copy()
    name = next(label for label in cells.obs["perturbation"].unique() if label != "control")
    assert bgen_model(out / "model").perturb(control, name).shape == (40, 120)

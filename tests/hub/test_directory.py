"""The exported model directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from bgen.errors import UserError
from bgen.hub.directory import SavedModel, count_combinations, load_directory, save_model


@pytest.fixture(scope="module")
def saved(demo: Any) -> SavedModel:
    return load_directory(demo.model)


def test_saving_again_gives_the_same_model(saved: SavedModel, demo: Any, tmp_path: Path) -> None:
    save_model(saved, tmp_path / "again")
    assert load_directory(tmp_path / "again").fingerprint() == saved.fingerprint()
    for name in ("config.json", "preprocessing.json", "genes.csv", "conditions.csv", "README.md"):
        assert (tmp_path / "again" / name).read_text() == (demo.model / name).read_text()


def test_export_of_a_run_is_what_training_exported(demo: Any) -> None:
    trained, exported = (load_file(folder / "model.safetensors") for folder in (demo.flow / "model", demo.model))
    assert trained.keys() == exported.keys()
    assert all(trained[name].equal(exported[name]) for name in trained)


@pytest.mark.usefixtures("few_latents")
@pytest.mark.parametrize("stage", ["vae", "flow", pytest.param("trajectories", marks=pytest.mark.slow)])
def test_export_of_a_run_with_shipped_settings_is_what_training_exported(
    stage: str, demo: Any, bgen: Any, tmp_path: Path
) -> None:
    """The settings that the README trains with keep the best weights, or their average, unlike the demo's."""
    few = ["train.steps=4", "train.eval_every=2", "train.global_batch=64", "track.mlflow=false", "track.progress=false"]
    if stage != "vae":
        few.append(f"flow.vae={demo.vae}")
    if stage == "trajectories":
        few += ["data.trajectories={system: [donor], times: 2, cells: 16}", "flow.backbone.width=64"]
    trained = bgen("train", stage, f"out={tmp_path / 'run'}", f"data.store={demo.store}", *few)
    assert trained.code == 0, trained
    exported = bgen("export", tmp_path / "run", "--out", tmp_path / "model")
    assert exported.code == 0, exported
    for file in (tmp_path / "run" / "model").iterdir():
        assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_flow_holds_its_vae_as_it_was_trained(demo: Any) -> None:
    vae, flow = (load_file(folder / "model" / "model.safetensors") for folder in (demo.vae, demo.flow))
    assert all(flow[f"vae.{name}"].equal(tensor) for name, tensor in vae.items())


def test_the_card_names_data_and_conditions(demo: Any) -> None:
    card = (demo.model / "README.md").read_text()
    for part in ("360 cells of cells.h5ad", "cell_type", "perturbation", "Not evaluated yet", "synthetic"):
        assert part in card


def test_there_is_no_pickle(demo: Any) -> None:
    for path in demo.model.iterdir():
        assert path.suffix in (".json", ".csv", ".md", ".safetensors")
        assert not path.read_bytes().startswith(b"\x80")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, "config.json", "format_version", 99), "bgen-model 99"),
        (lambda f: (f / "config.json").write_text("{"), "damaged"),
        (lambda f: (f / "genes.csv").write_text("id,symbol,cells\nG1,G1,1\n"), "not the gene table"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "damaged"),
        (lambda f: (f / "conditions.csv").unlink(), "conditions.csv is missing"),
        (shutil.rmtree, "no model directory"),
    ],
)
def test_damage_is_named(demo: Any, tmp_path: Path, damage: Any, message: str) -> None:
    folder = Path(shutil.copytree(demo.model, tmp_path / "model"))
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_directory(folder)


def test_a_model_is_never_written_over(saved: SavedModel, demo: Any) -> None:
    with pytest.raises(UserError, match="not empty"):
        save_model(saved, demo.model)


def test_combinations_are_counted_or_sampled() -> None:
    rng = np.random.default_rng(0)
    columns = {"a": rng.integers(0, 3, 1000), "b": rng.choice([0.5, np.nan], 1000)}
    table = count_combinations(columns)
    assert len(table) == 6
    assert table["cells"].sum() == 1000
    assert len(count_combinations({"x": rng.random(1000)}, limit=100)) == 100
    assert count_combinations({})["cells"].tolist() == [1]


def edit(folder: Path, name: str, key: str, value: object) -> None:
    tree = json.loads((folder / name).read_text())
    tree[key] = value
    (folder / name).write_text(json.dumps(tree))

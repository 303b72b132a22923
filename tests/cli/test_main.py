"""The command line: the whole job on simulated cells, and every mistake answered in one message with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from prefork import python, torchrun


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['bgen', '--help']\nfrom bgen.cli.main import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert not {'torch', 'anndata', 'pandas'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("demo", "train", "export", "generate", "evaluate", "data", "config"):
        assert verb in done.stdout


def verbs() -> list[list[str]]:
    from bgen.cli.main import app

    found = [[str(command.name or command.callback.__name__)] for command in app.registered_commands]
    for group in app.registered_groups:
        found += [
            [*([group.name] if isinstance(group.name, str) else []), str(command.name or command.callback.__name__)]
            for command in group.typer_instance.registered_commands
        ]
    return found


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_every_verb_has_help_with_an_example(bgen: Any, verb: list[str]) -> None:
    shown = bgen(*verb, "--help")
    assert shown.code == 0
    assert f"bgen {' '.join(verb)}" in shown.out.split("Example")[1]


def test_the_run_folders_hold_what_they_should(demo: Any) -> None:
    for run in (demo.vae, demo.flow):
        names = {path.name for path in run.iterdir()}
        assert {"config.yaml", "record.jsonl", "checkpoints", "model"} <= names
        rows = [json.loads(line) for line in (run / "record.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if row["kind"] == "train"]
        assert len(losses) == 6
        assert losses[-1] < losses[0]
        assert [row["step"] for row in rows if row["kind"] == "valid"] == [30, 60]
    files = {path.name for path in demo.model.iterdir()}
    assert files == {
        "README.md",
        "conditions.csv",
        "config.json",
        "genes.csv",
        "model.safetensors",
        "preprocessing.json",
    }


def test_check_and_info_as_json(bgen: Any, demo: Any) -> None:
    checked = json.loads(bgen("data", "check", demo.cells, "--json").out)
    assert checked["roles"]["cell_type"] == "cell_type"
    told = json.loads(bgen("data", "info", demo.store, "--json").out)
    assert told["splits"] == {"train": 360, "valid": 120, "test": 120}
    assert bgen("data", "verify", demo.store).code == 0


def test_generate_gives_counts_under_the_condition(bgen: Any, demo: Any, tmp_path: Path) -> None:
    cell_type = json.loads((demo.model / "preprocessing.json").read_text())["columns"]["cell_type"]["categories"][0]
    cells = []
    for name in ("a.h5ad", "b.h5ad"):
        made = bgen(
            "generate",
            demo.model,
            "--n",
            1000,
            "--where",
            f"cell_type={cell_type}",
            "--noise",
            1.1,
            "--seed",
            3,
            "--out",
            tmp_path / name,
        )
        assert made.code == 0, made.err
        cells.append(anndata.read_h5ad(tmp_path / name))
    first, second = cells
    assert first.shape == (1000, 120)
    assert first.X.data.min() > 0
    assert np.array_equal(first.X.data, np.rint(first.X.data))
    assert (first.obs["cell_type"] == cell_type).all()
    genes = anndata.read_h5ad(demo.cells).var_names
    assert set(first.var_names) == set(genes)
    assert first.var_names.tolist() == [
        line.split(",")[0] for line in (demo.model / "genes.csv").read_text().split()[1:]
    ]
    assert abs(first.X - second.X).nnz == 0
    assert first.uns["bgen"]["where"]["cell_type"] == cell_type
    assert first.uns["bgen"]["noise"] == 1.1


def wrong(result: Any, *parts: str) -> None:
    """One message, exit code 2, no traceback."""
    assert result.code == 2, result
    said = " ".join((result.err + result.out).replace("│", " ").split())  # a table's cell may be folded
    assert "Traceback" not in said
    for part in parts:
        assert part in said, said


def test_config_mistakes(bgen: Any) -> None:
    wrong(bgen("config", "check", "demo/vae", "train.stepps=3"), "train.stepps: unknown key", "Did you mean 'steps'?")
    wrong(bgen("config", "check", "demo/vaee"), "no configuration file 'demo/vaee'", "'demo/vae'")
    assert bgen("config", "check", "demo/vae").code == 0
    assert "latent: 10" in bgen("config", "show", "demo/vae").out


def test_deepspeed_settings_are_shown(bgen: Any) -> None:
    shown = json.loads(bgen("config", "show", "demo/vae", "train.global_batch=64", "--deepspeed", "--ranks", 2).out)
    assert shown["train_batch_size"] == 64
    assert shown["train_micro_batch_size_per_gpu"] == 32


def test_plan_and_doctor_speak_json(bgen: Any, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python())  # of which the doctor starts ranks
    monkeypatch.setenv("PYTHON_EXEC", python())
    planned = json.loads(bgen("plan", "demo/vae", f"data.store={demo.store}", "--json").out)
    assert planned
    wrong(bgen("plan", "demo/vae", f"data.store={demo.store}", "--gpu", "H1000"), "no GPU 'H1000'")
    found = json.loads(bgen("doctor", "--folder", demo.folder, "--json").out)
    assert {"packages", "disk", "two ranks"} <= {finding["name"] for finding in found}


def test_bench_train_measures_a_step(bgen: Any) -> None:
    measured = json.loads(bgen("bench", "train", "demo/flow", "--batch", 16).out)
    assert measured["stage"] == "flow"
    wrong(bgen("bench", "train", "demo/flow", "--device", "tpu"), "cpu or cuda")


def test_launch_writes_files_that_start_the_run(bgen: Any, tmp_path: Path) -> None:
    out = tmp_path / "launch"
    run = f"out={tmp_path / 'run'}"
    made = bgen("launch", "demo/vae", run, "--target", "local", "--device", "cpu", "--out", out)
    assert made.code == 0, made.err
    assert "Start it with: " in made.out
    assert subprocess.run(["bash", "-n", str(out / "local.sh")], check=False).returncode == 0
    wrong(bgen("launch", "demo/vae", run, "--target", "slrum"), "no launch target 'slrum'", "'slurm'")
    wrong(bgen("launch", "demo/vae", run, "--device", "tpu"), "cuda or cpu")


def test_stores_go_back_to_anndata_and_to_webdataset(bgen: Any, demo: Any, tmp_path: Path) -> None:
    assert bgen("data", "to-anndata", demo.store, "--out", tmp_path / "back.h5ad").code == 0
    before, back = anndata.read_h5ad(demo.cells), anndata.read_h5ad(tmp_path / "back.h5ad")
    assert abs(back[before.obs_names, before.var_names].X - before.X).nnz == 0
    wrong(bgen("data", "to-anndata", demo.store, "--out", tmp_path / "back.csv"), ".h5ad or .zarr")
    assert bgen("data", "to-webdataset", demo.store, "--out", tmp_path / "shards").code == 0
    assert list((tmp_path / "shards").rglob("*.tar"))
    settings = [
        "train.steps=4",
        "train.global_batch=64",
        "train.log_every=1",
        "train.eval_every=0",
        "track.mlflow=false",
    ]
    losses = []
    for run, store in (("here", demo.store), ("tar", tmp_path / "shards")):
        folder = tmp_path / run
        made = bgen("train", "demo/vae", f"out={folder}", f"data.store={store}", "train.patience=0", *settings)
        assert made.code == 0, made.err
        rows = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def change(source: Path, target: Path, how: Any) -> Path:
    adata = anndata.read_h5ad(source)
    adata = how(adata) or adata
    adata.write_h5ad(target)
    return target


def fractional(adata: anndata.AnnData) -> None:
    adata.X = adata.X * 0.5


def same_gene_twice(adata: anndata.AnnData) -> None:
    names = adata.var_names.to_list()
    names[1] = names[0]
    adata.var_names = names


def test_data_mistakes_leave_nothing_behind(bgen: Any, demo: Any, tmp_path: Path) -> None:
    store = tmp_path / "out" / "store"
    text = tmp_path / "notes.h5ad"
    text.write_text("no HDF5")
    fraction = change(demo.cells, tmp_path / "fraction.h5ad", fractional)
    twice = change(demo.cells, tmp_path / "twice.h5ad", same_gene_twice)
    for arguments, parts in (
        ([tmp_path / "missing.h5ad"], ["missing.h5ad"]),
        ([text], ["notes.h5ad"]),
        ([fraction], ["not counts", "fraction"]),
        ([twice], ["G01", "--merge-duplicates sum"]),
        ([demo.cells, "--cell-type", "celltipe"], ["celltipe", "cell_type"]),
        ([demo.cells, "--splits", "train=0.5"], ["add up to 0.5"]),
        ([demo.cells, "--profile", "tiny"], ["small or fast"]),
        ([demo.cells, "--split-by", "doner"], ["doner", "'donor'"]),
    ):
        wrong(bgen("data", "build", *arguments, "--out", store), *parts)
        assert not store.exists()
        assert list(store.parent.glob(".*")) == []
    merged = bgen("data", "build", twice, "--merge-duplicates", "sum", "--out", store)
    assert merged.code == 0, merged.err
    assert json.loads(bgen("data", "info", store, "--json").out)["n_genes"] == 119
    wrong(bgen("data", "build", demo.cells, "--out", store), "there already and not empty")


def test_a_full_disk_is_named_and_what_is_done_is_kept(bgen: Any, demo: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        wrong(bgen("data", "build", demo.cells, "--out", disk / "store"), "is full", "is kept in")
        assert not (disk / "store").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_flipped_byte_stops_verify_and_training(bgen: Any, demo: Any, tmp_path: Path) -> None:
    store = Path(shutil.copytree(demo.store, tmp_path / "store"))
    shard = store / "counts/c/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    wrong(bgen("data", "verify", store), "counts/c/0/0")
    run = tmp_path / "run"
    wrong(bgen("train", "demo/vae", f"out={run}", f"data.store={store}", "track.mlflow=false"), "counts", "verify")
    assert not (run / "model").exists()


def test_training_mistakes(bgen: Any, demo: Any, tmp_path: Path) -> None:
    run = f"out={tmp_path / 'run'}"
    store = f"data.store={demo.store}"
    wrong(bgen("train", "demo/vae", run, "data.store=nowhere"), "no store at nowhere")
    wrong(bgen("train", "demo/vae", run, store, "vae.covariates=[batsh]"), "batsh", "'batch'")
    wrong(bgen("train", "demo/vae", run, store, "train.micro_batch=100"), "micro_batch")
    wrong(bgen("train", "demo/flow", run, store, "flow.vae=nowhere"), "no trained VAE in nowhere")
    wrong(bgen("train", "demo/vae", f"out={demo.vae}", store), "already holds a run", "--resume")
    assert not (tmp_path / "run").exists()


def test_model_mistakes(bgen: Any, demo: Any, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "x.h5ad"]
    wrong(bgen("generate", "nowhere", *out), "no model directory at nowhere")
    wrong(bgen("generate", demo.model, "--where", "celltype=B", *out), "'celltype'", "'cell_type'")
    wrong(bgen("generate", demo.model, "--where", "cell_type=??", *out), "no value '??'")
    wrong(bgen("generate", demo.model, "--where", "cell_type", *out), "column=value")
    wrong(bgen("generate", demo.model, "--where", "time=soon", *out), "is a number")
    wrong(bgen("generate", demo.model, "--solver", "rk", *out), "solver")
    wrong(bgen("generate", demo.vae / "model", *out), "is a VAE")
    wrong(bgen("generate", demo.model, "--out", demo.cells), "there already")
    wrong(bgen("evaluate", demo.model, "--data", demo.store, "--out", demo.folder), "not empty")
    wrong(bgen("export", demo.folder, "--out", tmp_path / "m"), "not a run folder")
    broken = Path(shutil.copytree(demo.model, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"\0" * 64)
    wrong(bgen("generate", broken, *out), "damaged")
    (broken / "genes.csv").unlink()
    wrong(bgen("generate", broken, *out), "genes.csv is missing")
    assert not (tmp_path / "x.h5ad").exists()


def test_impossible_batch_under_torchrun_is_one_message(demo: Any, tmp_path: Path) -> None:
    command = [*torchrun(2), "--redirects", "3", "--tee", "3", "--log-dir", str(tmp_path / "log"), "-m", "bgen"]
    command += ["train", "demo/vae", f"out={tmp_path / 'run'}", f"data.store={demo.store}", "train.global_batch=33"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    said = [path.read_text() for path in sorted((tmp_path / "log").glob("*/attempt_0/*/stderr.log"))]
    assert len(said) == 2
    assert "".join(said).count("error:") == 1
    assert "train.global_batch=33 does not divide among 2 ranks" in said[0]
    assert "train.global_batch=32 or 34" in said[0]
    assert "Traceback" not in "".join(said)
    assert done.stderr.count("exitcode  : 2 ") == 2
    assert "bgen/train" not in done.stderr.split("Root Cause")[0]
    assert not (tmp_path / "run").exists()


def test_counts_of_real_files_are_judged(bgen: Any, real_data: Path, tmp_path: Path) -> None:
    wrong(bgen("data", "check", real_data / "worm_neuron_4186x13488.h5ad"), "G02")
    normalised = anndata.read_h5ad(real_data / "pbmc_facs_3774x16791.h5ad")
    normalised.layers["counts"] = normalised.X.copy()
    counts = sp.csr_matrix(normalised.X, dtype=np.float32)
    counts.data = np.log1p(counts.data / np.repeat(np.asarray(counts.sum(1)).ravel(), np.diff(counts.indptr)) * 1e4)
    normalised.X = counts
    normalised.write_h5ad(tmp_path / "log.h5ad")
    wrong(bgen("data", "build", tmp_path / "log.h5ad", "--out", tmp_path / "store"), "C01", "--counts layers/counts")

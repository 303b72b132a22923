"""Faults as `bgen train` answers them: with a checkpoint, one clear line, and the exit code that a scheduler reads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import LIMIT, environment
from prefork import python
from safetensors import SafetensorError

from bgen.checkpoint import files
from bgen.hub import directory
from bgen.store.format.manifest import read_manifest
from bgen.train.stages.from_store import StoreStage

QUIET = ["track.mlflow=false", "track.progress=false", "train.eval_every=0", "train.patience=0"]


def command(demo: Any, run: Path, *settings: str, store: Path | None = None) -> list[str]:
    paths = [f"out={run}", f"data.store={store or demo.store}", "train.global_batch=64", "train.log_every=1"]
    return ["train", "demo/vae", *paths, *QUIET, *settings]


def test_a_signal_exits_with_the_code_for_requeue(demo: Any, tmp_path: Path) -> None:
    """Fault 7: what is requeued with the same command finishes, with 0."""
    run = tmp_path / "run"
    arguments = command(demo, run, "train.steps=100000", "train.requeue_exit=99")
    start = [python(), "-m", "bgen", *arguments, "--resume"]
    with subprocess.Popen(start, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + LIMIT
        record = run / "record.jsonl"
        while not (record.exists() and record.stat().st_size > 2000) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR2)
        _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 99, said
    assert ": saved" in said
    assert "Go on with --resume." in said
    (folder,) = files.committed(run / "checkpoints")
    assert files.damage(folder) is None
    again = [*start, f"train.steps={files.step_of(folder) + 3}"]
    done = subprocess.run(again, env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    steps = [row["step"] for row in map(json.loads, record.read_text().splitlines()) if row["kind"] == "train"]
    assert steps == list(range(1, files.step_of(folder) + 4))


def test_other_data_is_refused_unless_it_is_accepted(bgen: Any, demo: Any, tmp_path: Path) -> None:
    """Fault 18."""
    run, other = tmp_path / "run", tmp_path / "other"
    assert bgen(*command(demo, run, "train.steps=2")).code == 0
    assert bgen("data", "build", demo.cells, "--out", other, "--splits", "train=0.5,valid=0.3,test=0.2").code == 0
    resume = [*command(demo, run, "train.steps=4", store=other), "--resume"]
    refused = bgen(*resume)
    assert refused.code == 2
    assert "other data, so the run cannot go on" in refused.err
    assert "store: was " in refused.err
    taken = bgen(*resume, "--accept-changed-data")
    assert taken.code == 0, taken.err
    alone = bgen(*command(demo, tmp_path / "new", "train.steps=4"), "--accept-changed-data")
    assert alone.code == 2
    assert "give --resume" in alone.err


def test_a_store_whose_manifest_was_edited(bgen: Any, demo: Any, tmp_path: Path) -> None:
    """Fault 18: the manifest says what the store is, so it may not say something else than it was written with."""
    store = tmp_path / "store"
    shutil.copytree(demo.store, store)
    run = tmp_path / "run"
    assert bgen(*command(demo, run, "train.steps=2", store=store)).code == 0
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"] = "0" * len(manifest["fingerprint"])
    path.write_text(json.dumps(manifest))
    refused = bgen(*command(demo, run, "train.steps=4", store=store), "--resume")
    assert refused.code == 2, refused
    assert len(files.committed(run / "checkpoints")) == 1


@pytest.mark.parametrize("stage", ["vae", "flow"])
def test_a_demo_that_is_stopped_says_so_once(
    bgen: Any, demo: Any, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = StoreStage.train_batches

    def batches(self: StoreStage, start_step: int) -> Iterator[Any]:
        for step, found in enumerate(drawn(self, start_step)):
            if step == 2 and self.config.stage == stage:
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    monkeypatch.setattr(StoreStage, "train_batches", batches)
    quick = [f"{name}.{key}" for name in ("vae", "flow") for key in ("train.steps=4", "train.global_batch=64")]
    quick += [f"{name}.track.mlflow=false" for name in ("vae", "flow")]
    done = bgen("demo", "--data", demo.cells, "--out", tmp_path / "out", *quick)
    assert done.code == 143, done
    assert done.err.count("error:") == 1
    assert "The demo was stopped by a signal and is not complete" in done.err
    assert "--resume" not in done.err
    assert not (tmp_path / "out" / stage / "model").exists()
    assert (tmp_path / "out" / "flow").exists() == (stage == "flow")


def test_a_disk_that_is_full_at_the_export_is_one_message_and_loses_no_model(
    bgen: Any, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert bgen(*command(demo, run, "train.steps=2")).code == 0
    before = {path.name: path.read_bytes() for path in (run / "model").iterdir()}

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(directory, "save_file", full)
        done = bgen(*command(demo, run, "train.steps=4"), "--resume")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert f"error: The model {run / 'model'} cannot be written: I/O error: No space left on device" in done.err
    assert {path.name: path.read_bytes() for path in (run / "model").iterdir()} == before
    assert not list(run.glob(".model*"))
    assert bgen(*command(demo, run, "train.steps=4"), "--resume").code == 0
    assert {path.name: path.read_bytes() for path in (run / "model").iterdir()} != before


def test_times_that_have_no_role_are_refused_before_training(bgen: Any, demo: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(demo.store, store)
    manifest = read_manifest(store)
    roles = {role: column for role, column in manifest.roles.items() if role != "time"}
    manifest.model_copy(update={"roles": roles}).with_fingerprint().write(store)
    asked = ["train", "trajectories", f"out={tmp_path / 'run'}", f"data.store={store}", f"flow.vae={demo.vae}", *QUIET]
    done = bgen(*asked, "data.trajectories={system: [donor], times: 3, cells: 16}", "train.global_batch=192")
    assert done.code == 2
    assert "does not know which column is the time of its cells" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """Whatever opens a file next does not get the number of a stream, into which others print."""
    code = (
        "from bgen.cli import main; import os, sys; f = open(sys.argv[1], 'w'); print('lost'); os.system('echo lost');"
        "f.write(str(f.fileno())); f.close(); main.results.print('lost'); main.notes.print('lost')"
    )
    said = subprocess.run(
        ["bash", "-c", f'"$0" -c "{code}" "$1" {closed}', sys.executable, tmp_path / "file"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, said.stdout) == (0, ""), said
    assert int((tmp_path / "file").read_text()) > 2

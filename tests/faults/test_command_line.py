"""Faults as `bgen train` answers them: with a checkpoint, one clear line, and the exit code that a scheduler reads."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from launching import LIMIT, environment
from prefork import python

from bgen.checkpoint import files

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
    assert "saved; go on with --resume" in said
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

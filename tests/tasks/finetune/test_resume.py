"""A fine-tuning that was killed goes on: the same losses and the same model as of one that nobody disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prefork import python
from safetensors.torch import load_file

from bgen.track.record import read

HERE = Path(__file__).parent
QUICK = ["train.steps=10", "train.eval_every=5", "train.global_batch=96", "train.log_every=1"]
QUICK += ["train.checkpoint_every=5", "track.progress=false"]
TASKS = {"annotate": ["--label", "cell_type"], "time": ["--time", "time", "--within", "donor"]}


def command(demo: Any, task: str, out: Path, *more: str) -> list[str]:
    return ["finetune", *map(str, (demo.model, demo.cells)), "--task", task, *TASKS[task], "--out", str(out), *more]


@pytest.mark.parametrize(
    ("task", "run", "step", "number"),
    [
        ("annotate", "vae", 8, signal.SIGKILL),
        pytest.param("annotate", "annotator", 8, signal.SIGTERM, marks=pytest.mark.slow),
        # before its first checkpoint: the new network is made again
        pytest.param("time", "flow", 3, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_as_if_undisturbed(
    bgen: Any, demo: Any, tmp_path: Path, task: str, run: str, step: int, number: int
) -> None:
    assert bgen(*command(demo, task, tmp_path / "calm", *QUICK)).code == 0
    asked = command(demo, task, tmp_path / "killed", *QUICK, "train.requeue_exit=7")
    paths = [str(HERE.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    killed = subprocess.run(
        [python(), HERE / "killed.py", run, str(step), str(int(number)), *asked],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert killed.returncode == (7 if number == signal.SIGTERM else -number), killed.stderr
    assert ("--resume" in killed.stderr) == (number == signal.SIGTERM)
    assert not (tmp_path / "killed" / "model").exists()
    again = bgen(*asked)
    assert (again.code, "already holds a run. Give --resume" in again.err) == (2, True)
    resumed = bgen(*asked, "--resume")
    assert resumed.code == 0, resumed
    records = sorted(path.relative_to(tmp_path / "calm") for path in (tmp_path / "calm").glob("*/record.jsonl"))
    assert len(records) == 2
    for name in records:
        calm, other = (read(tmp_path / folder / name) for folder in ("calm", "killed"))
        for kind in ("train", "valid"):
            losses = [[(r["step"], r["loss"]) for r in rows if r["kind"] == kind] for rows in (calm, other)]
            assert losses[0] == losses[1]
            assert len(losses[0]) == {"train": 10, "valid": 2}[kind]
    one, two = (load_file(tmp_path / folder / "model" / "model.safetensors") for folder in ("calm", "killed"))
    assert one.keys() == two.keys()
    assert all(tensor.equal(two[name]) for name, tensor in one.items())


def test_only_the_same_goes_on(bgen: Any, demo: Any, course: Path, tmp_path: Path) -> None:
    asked = command(demo, "annotate", tmp_path / "out", *QUICK)
    assert bgen(*asked, "--resume").code == 0  # there is nothing yet: it starts
    first = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert bgen(*asked, "--resume").code == 0  # nothing is left to do
    again = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert all(tensor.equal(again[name]) for name, tensor in first.items())
    other_label, other_parent = list(asked), list(asked)
    other_label[asked.index("cell_type")] = "batch"
    other_parent[1] = str(course)
    for changed, what in ((other_label, "request"), (other_parent, "parent")):
        refused = bgen(*changed, "--resume")
        assert refused.code == 2, refused
        assert "other data, so the run cannot go on" in refused.err
        assert f"{what}: was" in refused.err

"""Fine-tuning under torchrun: what one rank makes, two make; one speaks and writes; a mistake ends both."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import prefork
import pytest
import torch
from safetensors.torch import load_file
from script import tune

from bgen.hub.directory import load_directory
from bgen.track.record import read

HERE = Path(__file__).parent
SETTINGS = ["train.steps=10", "train.eval_every=5", "train.global_batch=64", "train.log_every=1"]
SETTINGS += ["track.progress=false"]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [*prefork.torchrun(2), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def assert_same_training(one: Path, two: Path) -> None:
    """The losses of all runs in two folders, and the models that came out."""
    runs = sorted(path.relative_to(one) for path in one.glob("*/record.jsonl"))
    assert runs
    for run in runs:
        for kind in ("train", "valid"):
            expected, found = ([r["loss"] for r in read(f / run) if r["kind"] == kind] for f in (one, two))
            assert len(expected) > 1
            assert found == pytest.approx(expected, rel=1e-5), (run, kind)
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_ranks_in_parts_are_one_and_one_reports(bgen: Any, demo: Any, tmp_path: Path) -> None:
    """Low-rank changes and the flow from control cells under ZeRO 3 with every parameter split."""
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    asked = ["finetune", demo.model, demo.cells, "--task", "perturb", "--perturbation", "perturbation"]
    asked += ["--control", "control", "--hold-out", "G0107", "--mode", "lora", *SETTINGS]
    alone = bgen(*asked, "--out", tmp_path / "one")
    assert alone.code == 0, alone
    both = torchrun("-m", "bgen", *asked, "train.zero=3", f"train.deepspeed={raw}", "--out", tmp_path / "two")
    assert both.returncode == 0, both.stderr[-4000:]
    assert_same_training(tmp_path / "one", tmp_path / "two")
    for said, times in (("train mean", alone.out.count("train mean")), ("Model:", 1)):
        assert both.stdout.count(said) == times
    assert both.stderr.count("Adapting the autoencoder") == 1
    for name in ("one", "two"):
        about = load_directory(tmp_path / name / "model").about
        assert about.perturbation is not None
        assert about.perturbation.held_out is not None
        assert about.perturbation.held_out.perturbations == ["G0107"]


@pytest.mark.slow  # as tests/multiprocess/test_ranks.py tells of a training, and test_blocks.py of a verb
def test_a_mistake_ends_both_with_one_message(demo: Any, tmp_path: Path) -> None:
    asked = ["finetune", demo.model, demo.cells, "--task", "annotate", "--label", "typ", "--out", tmp_path / "out"]
    logs = ["--redirects", "3", "--tee", "3", "--log-dir", tmp_path / "log"]
    done = torchrun(*logs, "-m", "bgen", *asked)
    said = "".join(path.read_text() for path in (tmp_path / "log").glob("*/attempt_0/*/stderr.log"))
    assert done.stderr.count("exitcode  : 2 ") == 2, done.stderr[-2500:]
    assert said.count("error:") == 1
    assert "no column 'typ'" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_task_in_every_mode(demo: Any, course: Path, tmp_path: Path) -> None:
    for name, place in (("model", demo.model), ("course", course), ("cells.h5ad", demo.cells)):
        (tmp_path / name).symlink_to(place)
    tune(tmp_path, tmp_path / "one", zero=1)
    both = torchrun(HERE / "script.py", "tuned", tmp_path)
    assert both.returncode == 0, both.stderr[-4000:]
    made = sorted((tmp_path / "one").iterdir())
    assert len(made) == 15
    for zero in (1, 3):
        for folder in made:
            assert_same_training(folder, tmp_path / f"two_{zero}" / folder.name)

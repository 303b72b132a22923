"""The real VAE and flow on a real store: one rank against two, a stopped run against an uninterrupted one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prefork import python, torchrun
from safetensors.torch import load_file

from bgen.track.record import read

HERE = Path(__file__).parent
STEPS = 8
SETTINGS = [
    f"train.steps={STEPS}",
    "train.global_batch=64",
    "train.checkpoint_every=4",
    "train.eval_every=4",
    "train.log_every=1",
    "track.mlflow=false",
    "track.progress=false",
]
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--module"]
"""Python, started by :mod:`prefork`, executes it, and it starts its ranks alike."""


STAGES = ["vae", "flow", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gene_set", "direct"))]
"""What is trained; the last two are variants of the first two."""


def losses(run: Path, kind: str = "train") -> list[float]:
    return [row["loss"] for row in read(run / "record.jsonl") if row["kind"] == kind]


def arguments(demo: Any, stage: str, run: Path) -> list[str]:
    more = ["train.patience=3", "vae.fit_levels=true"]
    if stage == "gene_set":
        encoder = "{name: gene_set, tokens: 3, width: 32, rows: 16, token_blocks: 1, values: true}"
        stage, more = "vae", [*more, f"vae.encoder={encoder}", "vae.decoder={name: gene_table, rows: 16}"]
    if stage == "flow":
        more = [f"flow.vae={demo.vae}", "flow.fit_levels=true", "sample.solver=euler", "sample.steps=1"]
    if stage == "direct":
        stage = "flow"
        more = ["flow.space=log_counts", "flow.vae=null", "flow.log_counts.counts=nb", "flow.fit_levels=true"]
        more += ["sample.solver=euler", "sample.steps=1"]
    return ["train", f"demo/{stage}", f"out={run}", f"data.store={demo.store}", "train.ema=0.99", *SETTINGS, *more]


@pytest.fixture(scope="module", autouse=True)
def _few_latents() -> Iterator[None]:
    """Enough to tell one way of training from another; the ranks that a test starts take as many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bgen.train.stages.levels.COMPARED_LATENTS", 256)
        yield


@pytest.fixture(scope="module", params=STAGES)
def whole(request: pytest.FixtureRequest, bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of 8 steps on one rank, uninterrupted."""
    run = tmp_path_factory.mktemp("whole") / request.param
    made = bgen(*arguments(demo, request.param, run))
    assert made.code == 0, made.err
    assert len(losses(run)) == STEPS
    return request.param, run


def test_stopped_and_resumed_is_bit_for_bit_the_same(whole: Any, bgen: Any, demo: Any, tmp_path: Path) -> None:
    stage, run = whole
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_00000008")
    shutil.rmtree(stopped / "model")
    made = bgen(*arguments(demo, stage, stopped), "--resume")
    assert made.code == 0, made.err
    resumed = [row for row in read(stopped / "record.jsonl") if row.get("event") == "resume"]
    assert [row["step"] for row in resumed] == [4]
    assert losses(stopped) == losses(run)
    assert losses(stopped, "valid") == losses(run, "valid")
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (run, stopped))
    assert all(before[name].equal(after[name]) for name in before)


def test_an_export_is_the_model_that_the_run_left(whole: Any, bgen: Any, demo: Any, tmp_path: Path) -> None:
    """Also the levels, which are fitted after the last checkpoint and are not those of the VAE that the flow had."""
    stage, run = whole
    made = bgen("export", run, "--out", tmp_path / "model")
    assert made.code == 0, made.err
    left, model = (load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "model"))
    assert all(left[name].equal(model[name]) for name in left)
    if stage == "flow":
        vae = load_file(demo.vae / "model" / "model.safetensors")
        other = [name for name in vae if not vae[name].equal(left[f"vae.{name}"])]
        assert other == ["decoder.logits.bias"]


def test_parameters_in_parts_train_the_same(whole: Any, bgen: Any, demo: Any, tmp_path: Path) -> None:
    """ZeRO 3 with every parameter split, also the frozen VAE's, and recomputed blocks; validated, saved, resumed."""
    stage, run = whole
    raw = tmp_path / "raw.json"
    raw.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    parts = tmp_path / "parts"
    shutil.copytree(run, parts)
    for folder in ("checkpoints/step_00000008", "model"):
        shutil.rmtree(parts / folder)
    settings = ["train.zero=3", f"train.deepspeed={raw}", "vae.recompute=true", "train.micro_batch=16"]
    made = bgen(*arguments(demo, stage, parts), *settings, "--resume")
    assert made.code == 0, made.err
    assert "converted from 1 rank at ZeRO 1 to 1 rank at ZeRO 3" in made.err
    assert losses(parts) == pytest.approx(losses(run), rel=1e-5)
    assert losses(parts, "valid") == pytest.approx(losses(run, "valid"), rel=1e-5)
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (run, parts))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_two_ranks_train_as_one(whole: Any, demo: Any, tmp_path: Path) -> None:
    """Started by the deepspeed launcher, or by torchrun."""
    stage, run = whole
    two = tmp_path / "two"
    launcher, more = [*torchrun(2), str(HERE / "few_latents.py")], {}
    if stage not in ("flow", "direct"):
        launcher, more = [python(), *DEEPSPEED, "bgen"], {"DS_ACCELERATOR": "cpu", "PREFORK_EXECUTABLE": python()}
    command = [*launcher, *arguments(demo, stage, two)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(two) == pytest.approx(losses(run), rel=1e-5)
    assert losses(two, "valid") == pytest.approx(losses(run, "valid"), rel=1e-5)
    one_rank, two_ranks = (load_file(folder / "model" / "model.safetensors") for folder in (run, two))
    for name, tensor in one_rank.items():
        torch.testing.assert_close(two_ranks[name], tensor, rtol=1e-3, atol=1e-3, msg=name)

"""Training on starts that are planned over whole populations of a store: whose they are, and that it can be resumed."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prefork import torchrun
from safetensors.torch import load_file

from bgen.config.load import load_config
from bgen.config.run import Config
from bgen.distributed.world import current
from bgen.errors import UserError
from bgen.flow import references
from bgen.models.generators.latent_flow import LatentFlow
from bgen.store.open import open_store
from bgen.tasks.load import load_model
from bgen.track.record import read
from bgen.train import auto_micro_batch as auto
from bgen.train.stages.flow import FlowStage
from bgen.train.stages.trajectories_from_store import population_latents

COUPLING = "flow.coupling={cells: 40, growth: true}"


def arguments(demo: Any, out: Path, *more: str, coupling: str = COUPLING) -> list[str]:
    return [
        *["train", "trajectories", f"out={out}", f"data.store={demo.store}", f"flow.vae={demo.vae}"],
        "data.trajectories={system: [donor], times: 3, cells: 8}",
        "flow.backbone={name: hybrid, width: 32, layers: 1, time: {scale: 24.0, tokens: 2}, mamba2: {head_width: 16}}",
        *["flow.source=neighbours", coupling, "train.steps=4", "train.global_batch=96", "train.eval_every=2"],
        *["train.log_every=1", "train.eval_cells=96", "train.checkpoint_every=2"],
        *["track.mlflow=false", "track.progress=false", *more],
    ]


def losses(run: Path, kind: str = "train") -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read(run / "record.jsonl") if row["kind"] == kind]


@pytest.fixture(scope="module")
def alone(bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank."""
    run: Path = tmp_path_factory.mktemp("whole") / "run"
    made = bgen(*arguments(demo, run))
    assert made.code == 0, made
    return run


def stage(demo: Any, tmp_path: Path, *more: str) -> FlowStage:
    config = load_config("trajectories", [*arguments(demo, tmp_path / "run", *more)[2:], "stage=flow"])
    assert isinstance(config, Config)
    return FlowStage(config, open_store(demo.store), current())


def test_every_population_is_planned_over_its_own_cells(demo: Any, tmp_path: Path) -> None:
    made = stage(demo, tmp_path)
    (batch,) = next(iter(made.train_batches(0)))
    assert made.trajectories is not None
    plans, codec = made.module.plans, made.codec
    ordered = made.trajectories.order.trajectories
    (held, _), *_ = made.valid_batches()
    for some, own, first in (
        (batch, ordered, 0),
        (held, made.trajectories.watched.trajectories, len(ordered.edges) - 1),
    ):
        population, cells = some.population[:, 1].tolist(), some.cells.view(some.mask.shape)
        for b, number in enumerate(population):
            there = own.population(number - first)
            assert set(cells[b, 1][some.mask[b, 1]].tolist()) <= set(there.tolist())
            reference = plans.reference(number)
            assert len(reference) == min(40, len(there))
            every = codec.latents(made.reader.read_cells(there)).numpy()
            assert np.abs(reference[:, None] - every).max(2).min(1).max() < 1e-4


def test_ranks_share_the_encoding(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage(demo, tmp_path)
    monkeypatch.setattr("bgen.train.stages.trajectories_from_store.TOGETHER", 100)
    assert made.trajectories is not None
    asked = made.codec, made.reader, made.trajectories.order.trajectories, 40
    whole = population_latents(*asked, current())
    parts = [population_latents(*asked, replace(current(), rank=rank, size=2)) for rank in range(2)]
    for reference, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(first + second, reference)
        assert (first == 0).all() or (second == 0).all()
    assert any((first == 0).all() for first in parts[0])
    assert not all((first == 0).all() for first in parts[0])


def test_a_run_that_is_resumed_is_the_same(alone: Path, bgen: Any, demo: Any, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    then = bgen(*arguments(demo, tmp_path / "run"), "--resume")
    assert then.code == 0, then
    assert [step for step, _ in losses(tmp_path / "run")][-2:] == [3, 4]
    assert losses(tmp_path / "run")[-2:] == losses(alone)[-2:]
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (alone, tmp_path / "run"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_two_ranks_are_one(alone: Path, demo: Any, tmp_path: Path) -> None:
    command = [*torchrun(2), "-m", "bgen", *arguments(demo, tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for kind in ("train", "valid"):
        one, two = (np.array(losses(run, kind)) for run in (alone, tmp_path / "run"))
        np.testing.assert_allclose(two, one, rtol=1e-5)


def test_the_exported_model_forecasts_by_what_it_learned(alone: Path, demo: Any) -> None:
    model = load_model(alone / "model")
    flow = model.saved.module
    assert isinstance(flow, LatentFlow)
    z = torch.randn(50, flow.size, generator=torch.Generator().manual_seed(0))
    weights = flow.grown(z, {}, 24.0)
    assert weights is not None
    assert weights.sum() == pytest.approx(1)
    assert weights.std() > 1e-6  # training has moved it
    made = model.forecast(demo.cells, 48.0, n=40, sample={"steps": 2})
    between = model.interpolate(demo.cells, 24.0, n=40, sample={"steps": 2})
    assert made.n_obs == between.n_obs == 40
    with torch.no_grad():  # of cells with large library sizes, almost all descend
        flow.growth.state.weight.zero_()
        flow.growth.state.weight[:, -1] = 5.0
        flow.growth.state.bias.zero_()
        flow.growth.condition.weight.zero_()
        flow.growth.head.weight.fill_(1.0)
    larger = model.forecast(demo.cells, 48.0, n=40, sample={"steps": 2})
    assert larger.X.sum(1).mean() > 1.2 * made.X.sum(1).mean()


@pytest.mark.parametrize(
    ("coupling", "more", "said"),
    [
        ("flow.coupling={growth: true}", [], "set cells"),
        (COUPLING, ["flow.source=noise"], "set source: neighbours"),
        (COUPLING, ["data.trajectories=null"], "no neighbours to start from"),
        (COUPLING, ["data.trajectories.along=perturbation"], "grows along time"),
        (COUPLING, ["flow.members={column: perturbation}"], "each control cell has one answer"),
    ],
)
def test_couplings_without_a_meaning_are_refused(
    coupling: str, more: list[str], said: str, bgen: Any, demo: Any, tmp_path: Path
) -> None:
    made = bgen(*arguments(demo, tmp_path / "run", *more, coupling=coupling))
    assert made.code == 2
    assert said in " ".join(made.err.split())


def test_references_that_memory_cannot_hold_are_refused_before_training(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "MOST_BYTES", 8000)
    with pytest.raises(UserError, match=r"flow\.coupling\.cells=40: .* Set it to 15, or to 0"):
        stage(demo, tmp_path)


def test_a_chosen_micro_batch_holds_whole_trajectories(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage of a store, with less memory at the first two trials than at the third."""
    limits = iter([0, 0, 1 << 50])
    monkeypatch.setattr(auto, "memory_limit", lambda world: next(limits))
    made, given = (stage(demo, tmp_path, f"train.micro_batch={cells}") for cells in ("auto", 24))
    tried = auto.find_micro_batch(made, made.config, current())
    assert [trial.cells for trial in tried] == [96, 48, 24]
    for found, wanted in zip(next(iter(made.train_batches(0))), next(iter(given.train_batches(0))), strict=True):
        assert len(found) == made.unit == 24
        assert found.cells.tolist() == wanted.cells.tolist()

"""References of whole populations of cells in memory: over time and along perturbations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from bgen.config.data import TrajectoriesConfig
from bgen.config.finetune import FinetuneConfig
from bgen.config.flow import CouplingConfig
from bgen.config.load import load_finetune
from bgen.data.cells_in_memory import MemoryCells
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.distributed.world import World
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.measured_latents import MeasuredLatents
from bgen.order.trajectories import Trajectories
from bgen.train.auto_micro_batch import with_micro_batch
from bgen.train.stages.course_in_memory import CourseStage
from bgen.train.stages.populations_in_memory import EncodedCells, PopulationStage
from bgen.train.stages.trajectories_in_memory import MemoryTrajectoryStage

CELLS, TRAIN = 90, np.arange(0, 90, 2)
TABLE = np.random.default_rng(0).normal(size=(CELLS, 3)).astype(np.float32)
TIME = np.repeat([0.0, 1.0, 2.0], 30)
VALID = np.setdiff1d(np.arange(CELLS), TRAIN)
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
COUNTS = MemoryCells(sp.csr_matrix(np.ones((CELLS, 1), np.float32)), {})


def settings(preset: str, folder: Path, batch: int) -> FinetuneConfig:
    said = [f"train.global_batch={batch}", "flow.backbone.width=32"]
    return load_finetune(preset, [*said, f"out={folder}"])


def flow(config: FinetuneConfig, cells: int) -> LatentFlow:
    coupling = CouplingConfig(cells=cells)
    own = config.flow.model_copy(update={"coupling": coupling, "members": None})
    return LatentFlow(own, MeasuredLatents(torch.from_numpy(TABLE)), {}, {})


def course(folder: Path, cells: int) -> MemoryTrajectoryStage:
    config, shape = settings("finetune/course", folder, 3 * 4 * 2), TrajectoriesConfig(times=3, cells=4)
    of_one = np.zeros(CELLS, np.int64)
    return CourseStage(config, flow(config, cells), COUNTS, shape, of_one, TIME, TRAIN, VALID, ALONE, {})


def screen(folder: Path, cells: int) -> MemoryTrajectoryStage:
    config = settings("finetune/perturbation", folder, 2 * 4 * 2)
    shape = TrajectoriesConfig(along="perturbation", times=2, cells=4)
    encoded = EncodedCells(TABLE, np.zeros_like(TABLE), {})
    done = TIME.astype(np.int64)  # of which 0 is the control
    splits = [Trajectories.along_perturbation(some, [], done[some], 0) for some in (TRAIN, VALID)]
    return PopulationStage(config, flow(config, cells), COUNTS, encoded, shape, *splits, ALONE, {})


@pytest.mark.parametrize("make", [course, screen])
def test_a_chosen_micro_batch_holds_whole_trajectories(make: object, tmp_path: Path) -> None:
    stage = make(tmp_path / "run", 12)  # type: ignore[operator]
    (whole,) = next(stage.train_batches(0))
    stage.split(with_micro_batch(stage.config, stage.unit))
    parts = next(stage.train_batches(0))
    assert [len(part) for part in parts] == [stage.shape.size] * 2
    assert torch.cat([part.cells for part in parts]).tolist() == whole.cells.tolist()


@pytest.mark.parametrize("make", [course, screen])
def test_every_population_has_its_own_cells(make: object, tmp_path: Path) -> None:
    stage = make(tmp_path / "run", 12)  # type: ignore[operator]
    (batch,) = next(iter(stage.train_batches(0)))
    (held, _), *_ = stage.valid_batches()
    plans = stage.flow.plans
    assert len(plans.edges) - 1 == 6
    for some, split, first in ((batch, TRAIN, 0), (held, VALID, 3)):
        assert isinstance(some, TrajectoryBatch)
        cells = some.cells.view(some.mask.shape)
        for b, row in enumerate(some.population.tolist()):
            for t, number in enumerate(row):
                own = split[TIME[split] == TIME[int(cells[b, t, 0])]]
                reference = plans.reference(number)
                assert first <= number < first + 3
                assert len(reference) == 12
                distance = np.abs(reference[:, None] - TABLE[own]).max(2)
                assert (distance.min(1) == 0).all()
                assert len(np.unique(distance.argmin(1))) == 12
    assert torch.isfinite(stage.flow.train()(batch)["loss"]).all()


@pytest.mark.parametrize("make", [course, screen])
def test_without_the_setting_nothing_is_encoded(make: object, tmp_path: Path) -> None:
    stage = make(tmp_path / "run", 0)  # type: ignore[operator]
    next(iter(stage.train_batches(0)))
    assert stage.flow.plans is None

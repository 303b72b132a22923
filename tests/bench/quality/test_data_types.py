"""``bgen bench representations --data-types``: that what is simulated is what it says, and that all is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bgen.bench.quality.data_types import (
    _COMMON,
    COURSES,
    PARAMETERS,
    POPULATIONS,
    bench_courses,
    bench_populations,
    courses,
    populations,
)
from bgen.config.flow import SampleConfig
from bgen.models.backbones.size import backbone_parameters, with_parameters


def test_only_its_past_tells_the_future_of_a_course() -> None:
    cells, time = courses(50, 12, "uneven", 0, 3)
    again, _ = courses(50, 12, "uneven", 0, 3)
    assert torch.equal(cells, again)
    assert not torch.equal(cells, courses(50, 12, "uneven", 0, 4)[0])
    assert (time.diff() > 0.29).all()
    assert time.diff().std() > 0.2
    assert courses(50, 12, "even", 0, 3)[1].diff().std() == 0
    shuffled, _ = courses(50, 12, "uneven", 0, 3, shuffled=True)
    assert torch.equal(shuffled.sort(1).values, cells.sort(1).values)
    step, of_shuffled = ((c[:, 1:] - c[:, :-1]).square().mean() for c in (cells, shuffled))
    assert step < 0.6 * of_shuffled  # neighbours in time are alike


def test_in_a_crowd_all_cells_move_alike_and_otherwise_those_that_stand_aside() -> None:
    for answer in ("crowd", "own"):
        cells, _ = populations(40, answer, 0, 1)  # type: ignore[arg-type]
        aside = cells[:, 0, :, 0].abs() > 1.5
        moved = cells[:, 1, :, 1] - cells[:, 0, :, 1]
        torch.testing.assert_close(moved.mean(1), 2 * aside.float().mean(1), atol=0.3, rtol=0)
        assert (moved[aside].mean() - moved[~aside].mean() > 1.5) == (answer == "own")


def test_every_mixer_has_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {
        "COURSES": {name: COURSES[name] for name in ("no mixing over time", "mamba2")},
        "POPULATIONS": {name: POPULATIONS[name] for name in ("no mixing over cells", "set attention")},
    }
    for name, value in {"TESTED": 4, "DRAWS": 1, "SOLVER": SampleConfig(steps=1), **few}.items():
        monkeypatch.setattr(f"bgen.bench.quality.data_types.{name}", value)
    torch.set_num_threads(1)
    found = bench_courses(seeds=1, steps=2, say=lambda text: None)
    assert len(found.runs["mamba2"][0]) == 12
    assert found.against["mamba2, times shuffled"] == "mamba2"
    found = bench_populations(seeds=1, steps=2, say=lambda text: None)
    assert set(found.runs["set attention"][0]) == {"error, crowd", "error, own"}


@pytest.mark.slow
def test_the_command_makes_all_tables(bgen: Any, tmp_path: Path) -> None:
    done = bgen("bench", "representations", "--data-types", "--seeds", 1, "--steps", 2, "--out", tmp_path / "out")
    assert done.code == 0, done
    told = json.loads((tmp_path / "out" / "data_types.json").read_text(encoding="utf-8"))
    assert set(told) == {"pathways", "regulators", "courses", "populations", "perturbations", "sequences"}
    assert "regulators, hard: no difference (against regulators, shuffled, hard)." in done.out


def test_a_file_and_simulated_data_are_not_asked_for_at_once(bgen: Any, tmp_path: Path) -> None:
    done = bgen("bench", "representations", "cells.h5ad", "--data-types", "--out", tmp_path / "out")
    assert done.code == 2
    assert "give no file" in done.err
    done = bgen("bench", "representations", "--out", tmp_path / "out")
    assert (done.code, "or --data-types" in done.err) == (2, True)


def test_mixers_are_compared_at_about_as_many_parameters() -> None:
    for size, rows in ((4, COURSES), (2, POPULATIONS)):
        for backbone in rows.values():
            config = with_parameters(size, {**_COMMON, **backbone}, PARAMETERS, 4)
            assert abs(backbone_parameters(size, config) / PARAMETERS - 1) < 0.2

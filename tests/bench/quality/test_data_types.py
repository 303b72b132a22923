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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two mixers along each axis, and few courses and populations."""
    few = {
        "COURSES": {name: COURSES[name] for name in ("no mixing over time", "mamba2")},
        "POPULATIONS": {name: POPULATIONS[name] for name in ("no mixing over cells", "set attention")},
    }
    for name, value in {"TESTED": 4, "DRAWS": 1, "SOLVER": SampleConfig(steps=1), **few}.items():
        monkeypatch.setattr(f"bgen.bench.quality.data_types.{name}", value)
    torch.set_num_threads(1)


@pytest.mark.usefixtures("small")
def test_every_mixer_has_its_figures(tmp_path: Path) -> None:
    found = bench_courses(tmp_path / "courses", seeds=1, steps=2, say=lambda text: None)
    assert len(found.runs["mamba2"][0]) == 12
    assert found.against["mamba2, times shuffled"] == "mamba2"
    found = bench_populations(tmp_path / "populations", seeds=1, steps=2, say=lambda text: None)
    assert set(found.runs["set attention"][0]) == {"error, crowd", "error, own"}


@pytest.mark.usefixtures("small")
def test_tables_that_were_stopped_go_on_where_they_were(bgen: Any, tmp_path: Path) -> None:
    given = ["bench", "representations", "--data-types", "--seeds", 1, "--steps", 2, "--out", tmp_path / "out"]
    done = bgen(*given, "--only", "populations")
    assert done.code == 0, done
    kept = tmp_path / "out" / "populations" / "rows.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    kept.write_text("\n".join([*lines[:2], lines[2][:20]]), encoding="utf-8")  # while the second row was written
    again = bgen(*given, "--resume", "--only", "populations", "--only", "courses")
    assert again.code == 0, again
    assert ("no mixing over cells, seed 0" in again.err, "set attention, seed 0" in again.err) == (False, True)
    assert kept.read_text(encoding="utf-8").splitlines() == lines
    told = json.loads((tmp_path / "out" / "data_types.json").read_text(encoding="utf-8"))
    assert set(told) == {"courses", "populations"}
    assert (tmp_path / "out" / "courses.png").stat().st_size > 0
    other = bgen(*given[:-3], 3, "--out", tmp_path / "out", "--resume", "--only", "populations")
    assert (other.code, "was measured with steps=2, not 3" in other.err) == (2, True)
    assert bgen(*given, "--only", "populations").code == 2  # the folder is not new
    unknown = bgen(*given[:-1], tmp_path / "new", "--only", "population")
    assert (unknown.code, "Did you mean 'populations'" in unknown.err) == (2, True)
    nowhere = bgen(*given[:-1], tmp_path / "new", "--resume")
    assert (nowhere.code, "there is no folder" in nowhere.err) == (2, True)


@pytest.mark.slow
def test_the_command_makes_all_tables(bgen: Any, tmp_path: Path) -> None:
    given = ["bench", "representations", "--data-types", "--seeds", 1, "--steps", 2, "--out", tmp_path / "out"]
    done = bgen(*given)
    assert done.code == 0, done
    told = json.loads((tmp_path / "out" / "data_types.json").read_text(encoding="utf-8"))
    assert set(told) == {"pathways", "regulators", "courses", "populations", "perturbations", "sequences"}
    assert "regulators, hard: no difference (against regulators, shuffled, hard)." in done.out
    again = bgen(*given, "--resume")  # all is there
    assert (again.code, "seed 0" in again.err, "split 0" in again.err) == (0, False, False), again
    assert again.out == done.out


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

"""Real processes: the same training on one rank and on two, with every launcher, and through every way to die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prefork import python, torchrun
from script import AVERAGED, HOP, SHORT, resharding_config
from toy import run, toy_config

from bgen.checkpoint import files
from bgen.track import record

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
LIMIT = 170


def environment() -> dict[str, str]:
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"PYTHONPATH": os.pathsep.join(paths), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def launch(launcher: list[str], scenario: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [*launcher, str(HERE / "script.py"), scenario, str(folder)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False)


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"result_{rank}.json").read_text())
    return found


@pytest.fixture(scope="module", params=[1, *(pytest.param(zero, marks=pytest.mark.slow) for zero in (0, 3))])
def zero(request: pytest.FixtureRequest) -> int:
    """A ZeRO stage. Of the others, what goes from stage to stage and the flow of trajectories are told at once."""
    stage: int = request.param
    return stage


@pytest.fixture(scope="module")
def one_rank(zero: int, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the undisturbed run on one rank."""
    settings = SHORT | {"zero": zero, "steps": 25}
    return run(toy_config(tmp_path_factory.mktemp("one") / "run", settings))[0].losses


@pytest.fixture(scope="module")
def two_ranks(zero: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the scenario ``two_ranks``; it finds a run that one rank left at step 10."""
    folder = tmp_path_factory.mktemp("two")
    run(toy_config(folder / f"one_rank_{zero}", SHORT | {"zero": zero}), stop_after=10)
    done = launch(torchrun(2), "two_ranks", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_two_ranks_have_the_losses_of_one(two_ranks: Path, one_rank: list[float], zero: int) -> None:
    straight = result(two_ranks)[f"straight_{zero}"]
    assert len(straight) == 20
    np.testing.assert_allclose(straight, one_rank[:20], rtol=1e-5)
    assert result(two_ranks, 1)[f"straight_{zero}"] == straight


def test_norms_of_layers_are_those_of_one_rank_without_zero(two_ranks: Path, zero: int, tmp_path: Path) -> None:
    """Straight, resumed with two micro batches a step, and resumed from one rank."""
    run(toy_config(tmp_path / "run", SHORT | {"zero": 0}))
    folders = [tmp_path / "run", *(two_ranks / f"{kind}_{zero}" for kind in ("straight", "halves", "one_rank"))]
    found = []
    for folder in folders:
        rows = [row for row in record.read(folder / "record.jsonl") if row["kind"] == "norms"]
        assert [row["step"] for row in rows] == [10, 20]
        found.append({f"{row['step']}/{layer}": row[layer] for row in rows for layer in row if "/" in layer})
    assert len(found[0]) == 2 * 9
    for folder, norms in zip(folders, found, strict=True):
        assert norms == pytest.approx(found[0], rel=1e-4), folder


def test_ranks_choose_the_micro_batch_that_fits_on_all_of_them(two_ranks: Path, one_rank: list[float]) -> None:
    for rank in (0, 1):
        found = result(two_ranks, rank)["chosen"]
        assert found["cells"] == 2
        np.testing.assert_allclose(found["losses"], one_rank[:3], rtol=1e-5)


@pytest.mark.slow
def test_gradients_may_travel_in_bf16(tmp_path: Path) -> None:
    """Close to float32 and not equal to it, and fewer bytes, at every ZeRO stage and under autocast."""
    done = launch(torchrun(2), "reduced", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert result(tmp_path) == result(tmp_path, 1)
    told, before = {}, 0  # what a process has sent is added up over its runs
    for name in result(tmp_path):
        rows = [row for row in record.read(tmp_path / name / "record.jsonl") if row.get("event") == "communication"]
        sent = sum(value["bytes"] for value in rows[-1].values() if isinstance(value, dict))
        told[name], before = sent - before, sent
    for zero, precision in [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bf16")]:
        one, other = (f"{zero}_{sent}_{precision}" for sent in ("float32", "bf16"))
        exact, rounded = (result(tmp_path)[name] for name in (one, other))
        np.testing.assert_allclose(rounded, exact, rtol=0.02)
        assert rounded != exact
        assert told[other] < 0.8 * told[one], (told[other], told[one])


def test_a_rank_imports_nothing_slow_that_it_does_not_need(tmp_path: Path) -> None:
    done = launch([sys.executable], "plain", tmp_path)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path)["imported"] == ["deepspeed"]


def test_a_signal_to_one_rank_stops_both_and_the_resumed_run_is_the_same(
    two_ranks: Path, one_rank: list[float], zero: int
) -> None:
    for rank in (0, 1):
        assert result(two_ranks, rank)[f"interrupted_{zero}"] == [True, 10]
    np.testing.assert_allclose(result(two_ranks)[f"halves_{zero}"], one_rank[:20], rtol=1e-5)
    assert result(two_ranks, 0)[f"weights_{zero}"] == result(two_ranks, 1)[f"weights_{zero}"]


def test_one_rank_to_two_and_save_and_resume_again(two_ranks: Path, one_rank: list[float], zero: int) -> None:
    losses = result(two_ranks)[f"from_one_rank_{zero}"]
    np.testing.assert_allclose(losses, one_rank[10:], rtol=1e-5)
    resumed = [
        row for row in record.read(two_ranks / f"one_rank_{zero}" / "record.jsonl") if row.get("event") == "resume"
    ]
    converted = [message for row in resumed for message in row["messages"]]
    assert converted == [f"step_00000010: converted from 1 rank at ZeRO {zero} to 2 ranks at ZeRO {zero}"]


def test_two_ranks_to_one(two_ranks: Path, one_rank: list[float], zero: int) -> None:
    config = toy_config(two_ranks / f"halves_{zero}", SHORT | {"zero": zero, **AVERAGED, "steps": 23})
    resumed, _ = run(config, resume=True)
    assert (resumed.step, len(resumed.losses)) == (23, 3)
    np.testing.assert_allclose(resumed.losses, one_rank[20:23], rtol=1e-5)
    rows = record.read(resumed.record)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 24))


@pytest.mark.parametrize("begun", [[1], pytest.param([0, 1, 2, 3], marks=pytest.mark.slow)])
def test_from_rank_to_rank_and_stage_to_stage(tmp_path: Path, begun: list[int]) -> None:
    """Runs that begin at these ZeRO stages go from 1 rank to 2, to 3 and back to 1, at the next stage each time."""
    straight, whole = run(
        toy_config(tmp_path / "straight", AVERAGED | {"steps": 4 * HOP, "global_batch": 12, "micro_batch": 2})
    )
    losses: dict[int, list[float]] = {}
    for first in begun:
        losses[first] = run(resharding_config(tmp_path, first, hops=0))[0].losses
    for count in (2, 3):
        done = launch(torchrun(count), "resharded", tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        for first in begun:
            losses[first] += result(tmp_path)[str(first)]
    for first in begun:
        last, stage = run(resharding_config(tmp_path, first, hops=3), resume=True)
        losses[first] += last.losses
        np.testing.assert_allclose(losses[first], straight.losses, rtol=1e-5)
        resumed = [losses[first][hop * HOP] for hop in (1, 2, 3)]
        np.testing.assert_allclose(resumed, [straight.losses[hop * HOP] for hop in (1, 2, 3)], rtol=1e-6)
        for name, value in whole.module.state_dict().items():
            torch.testing.assert_close(stage.module.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_what_is_not_finite_on_one_rank_is_skipped_on_both(two_ranks: Path, zero: int) -> None:
    for rank in (0, 1):
        found = result(two_ranks, rank)[f"poisoned_{zero}"]
        assert found["finite"]
        assert [step for step, loss in enumerate(found["losses"]) if loss is None] == [3, 5]
    rows = record.read(two_ranks / f"poisoned_{zero}" / "record.jsonl")
    skipped = {row["step"]: row for row in rows if row.get("event") == "skipped"}
    assert (skipped[4]["reason"], skipped[4]["cells"]) == ("loss", [3004])
    assert (skipped[6]["reason"], skipped[6]["cells"]) == ("gradient", list(range(5000, 5008)))
    assert [row["skipped"] for row in rows if row["kind"] == "train"][-1] == 2


def test_every_rank_has_the_buffers_of_rank_0(two_ranks: Path, zero: int) -> None:
    for rank in (0, 1):
        found = result(two_ranks, rank)[f"poisoned_{zero}"]
        assert found["given"] == [[0.0] * 3] * 2
        assert found["told"] is False


@pytest.mark.slow  # tests/multiprocess/test_stages.py starts the command by it
def test_the_deepspeed_launcher_runs_the_same_script(tmp_path: Path) -> None:
    done = launch([str(BIN / "deepspeed"), "--num_accelerators", "2"], "plain", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    alone, _ = run(toy_config(tmp_path / "alone", {"steps": 5}))
    assert result(tmp_path)["losses"] == pytest.approx(alone.losses, rel=1e-5)
    assert result(tmp_path)["losses"] == result(tmp_path, 1)["losses"]


def test_an_impossible_batch_is_one_message_from_rank_0(tmp_path: Path) -> None:
    done = launch(
        [*torchrun(2), "--redirects", "3", "--tee", "3", "--log-dir", str(tmp_path / "log")], "impossible", tmp_path
    )
    assert done.returncode != 0
    said = [path.read_text() for path in sorted((tmp_path / "log").glob("*/attempt_0/*/stderr.log"))]
    assert len(said) == 2
    assert "".join(said).count("error:") == 1
    assert "train.global_batch=9 does not divide among 2 ranks" in said[0]
    assert "train.global_batch=8 or 10" in said[0]
    assert "Traceback" not in "".join(said)
    assert done.stderr.count("exitcode  : 2 ") == 2
    assert not (tmp_path / "run").exists()


def test_sigterm_saves_and_exits_with_0(tmp_path: Path) -> None:
    command = [python(), str(HERE / "script.py"), "endless", str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        path = tmp_path / "run" / "record.jsonl"
        deadline = time.monotonic() + LIMIT
        while not (path.exists() and path.stat().st_size > 2000) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    assert result(tmp_path)["interrupted"]
    (folder,) = files.committed(tmp_path / "run" / "checkpoints")
    assert files.step_of(folder) == result(tmp_path)["step"]
    assert files.damage(folder) is None
    assert "stopped by a signal at step" in said


def test_killed_between_save_and_commit(tmp_path: Path) -> None:
    done = launch([python()], "killed_while_saving", tmp_path)
    assert done.returncode == -signal.SIGKILL
    (unfinished,) = (tmp_path / "run" / "checkpoints").glob("step_00000020.tmp*")
    assert unfinished.is_dir()
    resumed, _ = run(toy_config(tmp_path / "run", {"steps": 30, "checkpoint_every": 10}), resume=True)
    assert len(resumed.losses) == 20
    undisturbed, _ = run(toy_config(tmp_path / "other", {"steps": 30}))
    assert resumed.losses == undisturbed.losses[10:]
    steps = [row["step"] for row in record.read(resumed.record) if row["kind"] == "train"]
    assert steps == list(range(1, 31))
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp*"))

"""Whose run folder it is: one live job's, and never that of a dead one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bgen.checkpoint import files, ownership, shards
from bgen.checkpoint.commit import Checkpoints
from bgen.checkpoint.ownership import Owner, Superseded, owning
from bgen.distributed import world as ranks
from bgen.errors import UserError


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.start(30)
    monkeypatch.setattr(ownership, "BEAT", 0.05)
    monkeypatch.setattr(ownership, "SILENCE", 60.0)  # a beat is heard well before, on a busy machine too
    monkeypatch.setattr(ownership, "DYING", 0.2)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)


@pytest.fixture
def owners(tmp_path: Path) -> Iterator[Any]:
    """Make owners of one folder, which leave it at the end."""
    made: list[Owner] = []

    def make() -> Owner:
        made.append(Owner(tmp_path))
        return made[-1]

    yield make
    for owner in made:
        owner._stop.set()


def change(folder: Path, number: int, **values: object) -> None:
    """Let an attempt say something else of itself."""
    path = folder / "lock" / f"{number:08d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut_off(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """End an owner's beat, and let the next one not wait for long."""
    owner._stop.set()
    owner._heart.join()  # a beat may have been on its way
    monkeypatch.setattr(ownership, "SILENCE", 1.0)


def finished_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_second_job_is_refused_and_the_first_is_not_disturbed(tmp_path: Path, owners: Any) -> None:
    first, second = owners(), owners()
    first.take()
    with pytest.raises(UserError, match=f"Another job is at work on .*: process {os.getpid()} on "):
        second.take()
    first.check()


def test_a_dead_job_blocks_nobody(tmp_path: Path, owners: Any) -> None:
    owners().take()
    change(tmp_path, 1, process=finished_process())
    owners().take()
    assert [path.name for path in sorted((tmp_path / "lock").glob("*.json"))] == ["00000002.json"]


def test_a_job_that_is_just_ending_is_waited_for(tmp_path: Path, owners: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "DYING", 60.0)
    first = owners()
    first.take()
    timer = threading.Timer(0.2, first.release)
    timer.start()
    owners().take()
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        change(tmp_path, 2, process=process.pid, born=ownership._born(process.pid))
        threading.Timer(0.2, process.kill).start()
        owners().take()
    assert [path.name for path in (tmp_path / "lock").glob("*.json")] == ["00000003.json"]


def test_a_process_that_got_the_number_of_a_dead_one_is_another(tmp_path: Path, owners: Any) -> None:
    owners().take()
    change(tmp_path, 1, born=1.0)
    owners().take()


@pytest.mark.parametrize("harm", ["host", "boot", "namespace"])
def test_of_another_host_the_beat_decides(
    tmp_path: Path, owners: Any, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = owners()
    first.take()
    change(tmp_path, 1, **{harm: "elsewhere"})
    with pytest.raises(UserError, match="Another job is at work on"):
        owners().take()
    cut_off(first, monkeypatch)
    owners().take()
    with pytest.raises(Superseded, match="was taken over by process"):
        first.check()


def test_a_file_that_cannot_be_read_is_judged_by_its_beat(
    tmp_path: Path, owners: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = owners()
    first.take()
    (tmp_path / "lock" / "00000001.json").write_text("")
    with pytest.raises(UserError, match="another job"):
        owners().take()
    cut_off(first, monkeypatch)
    owners().take()


def test_of_many_that_start_together_one_gets_it(tmp_path: Path, owners: Any) -> None:
    gate = threading.Barrier(6)
    outcomes: list[bool] = []

    def start() -> None:
        owner = owners()
        gate.wait()
        try:
            owner.take()
            outcomes.append(True)
        except UserError:
            outcomes.append(False)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 5 + [True]


def test_who_left_it_leaves_it_at_once_and_its_number_is_not_given_again(tmp_path: Path) -> None:
    with owning(tmp_path) as first:
        pass
    with owning(tmp_path) as second, owning(tmp_path) as nested:
        assert nested is second
        second.check()
        with pytest.raises(Superseded):
            first.check()
    assert sorted(path.name for path in (tmp_path / "lock").iterdir()) == ["00000002.json"]
    with owning(tmp_path) as third:
        assert third.number == 3


def test_a_beat_on_its_way_is_not_written_after_the_folder_was_left(
    tmp_path: Path, owners: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT", 60.0)
    on_its_way, beat = threading.Event(), Owner._beat

    def slow(owner: Owner, count: int) -> None:
        if count:
            on_its_way.set()
            time.sleep(0.5)
        beat(owner, count)

    monkeypatch.setattr(Owner, "_beat", slow)
    owner = owners()
    monkeypatch.setattr(owner._stop, "wait", lambda seconds: owner._stop.is_set())
    owner.take()
    assert on_its_way.wait(60)
    owner.release()
    owner._heart.join()
    assert [path.name for path in (tmp_path / "lock").iterdir()] == ["00000001.json"]


def test_a_job_that_lost_its_folder_commits_nothing(tmp_path: Path, owners: Any) -> None:
    def save(checkpoints: Checkpoints, step: int) -> Path:
        tensors = {shards.key(shards.WEIGHT, 0, "w"): torch.full((250,), float(step))}
        return checkpoints.save(step, tensors, {"w": (250,)}, "{}", {})

    older, newer = Checkpoints(tmp_path / "checkpoints", 2), Checkpoints(tmp_path / "checkpoints", 2)
    older.owner = owners()
    older.owner.take()
    save(older, 1)
    written = threading.Event()
    taken = threading.Event()

    def pause() -> None:  # between the writing of the files and the commit
        written.set()
        taken.wait(30)

    tensors = {shards.key(shards.WEIGHT, 0, "w"): torch.zeros(250)}
    older.begin(2, tensors, {"w": (250,)}, "{}", {}, before=pause)
    while older.advance(*older.status()) is None and not written.is_set():
        time.sleep(0.01)
    change(tmp_path, 1, process=finished_process())
    newer.owner = owners()
    newer.owner.take()
    assert files.step_of(save(newer, 3)) == 3
    taken.set()
    with pytest.raises(Superseded, match="its last steps are not saved"):
        older.finish()
    with pytest.raises(Superseded):
        save(older, 4)
    assert [files.step_of(folder) for folder in files.committed(tmp_path / "checkpoints")] == [3, 1]
    assert all(files.damage(folder) is None for folder in files.committed(tmp_path / "checkpoints"))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_restarts_without_a_new_checkpoint_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    counted = []
    for attempt in range(7):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with owning(tmp_path) as owner:
            counted.append(owner.fruitless)
            if attempt == 3:
                checkpoints.save(attempt, {}, {}, "{}", {})
            owner.done = attempt == 5
    assert counted == [0, 1, 2, 3, 0, 1, 0]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # a person starts the launcher again
    with owning(tmp_path) as owner:
        assert owner.fruitless == 0


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"The run folder .* cannot be written to: "), owning(tmp_path / "file" / "run"):
        pass

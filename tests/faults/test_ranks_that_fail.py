"""Ranks that die, hang, are slow or are told to stop: two real processes each."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from launching import LIMIT, launch, result, rows, start, torchrun
from prefork import python
from scenarios import SETTINGS
from toy import run, toy_config

from bgen.checkpoint import files, ownership
from bgen.errors import UserError


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run(toy_config(tmp_path_factory.mktemp("undisturbed") / "run", SETTINGS))[0].losses


def test_killed_in_a_step_and_in_a_save_the_job_finishes_by_itself(tmp_path: Path, undisturbed: list[float]) -> None:
    """Faults 3 and 4: kill -9 of a rank, in the middle of a step and in the middle of a save."""
    code, said = launch(torchrun(2, "--max-restarts=2"), "killed_twice", tmp_path)
    assert code == 0, said[-4000:]
    assert {path.name for path in tmp_path.glob("once_*")} == {"once_step", "once_save"}
    resumed = [files.step_of(Path(row["checkpoint"])) for row in rows(tmp_path, "resume")]
    assert resumed[0] in (5, 10)
    assert resumed[-1] == 15  # the save of step 20 was cut off: one interval is lost
    losses = {row["step"]: row["loss"] for row in rows(tmp_path)}
    np.testing.assert_allclose([losses[step] for step in range(1, 31)], undisturbed, rtol=1e-5)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp*"))


def test_what_is_slow_at_the_disk_is_no_hang(tmp_path: Path) -> None:
    """Checkpoint, record and last work of one rank each take longer than a step may: the others wait for it."""
    code, said = launch(torchrun(2), "slow_disk", tmp_path)
    assert code == 0, said[-4000:]
    assert {path.name for path in tmp_path.glob("once_*")} == {"once_shards", "once_record", "once_finish"}
    assert [files.step_of(folder) for folder in files.committed(tmp_path / "run" / "checkpoints")] == [8, 4]
    assert not (tmp_path / "run" / "stacks").exists()


def test_a_folder_that_the_ranks_do_not_share_is_found_before_the_first_step(tmp_path: Path) -> None:
    code, said = launch(torchrun(2), "own_disk", tmp_path)
    assert code != 0
    assert said.count("is not one folder for all ranks: rank 1 on ") == 1
    assert "does not see what rank 0 wrote there" in said
    assert list(tmp_path.glob("*/run/record.jsonl")) == []


def test_a_second_job_is_refused_while_the_first_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "DYING", 0.1)
    config = toy_config(tmp_path / "run", SETTINGS | {"steps": 10**6})
    with start([python()], "endless", tmp_path, stdout=subprocess.DEVNULL) as process:
        wait_for_steps(tmp_path, process)
        with pytest.raises(UserError, match=r"Another job is at work on .*: process "):
            run(config, resume=True)
        seen = len(rows(tmp_path))
        deadline = time.monotonic() + LIMIT
        while len(rows(tmp_path)) == seen and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() is None
        process.kill()
    monkeypatch.setattr(ownership, "DYING", 120.0)  # that process is a client's: its end is not that of the job's
    first, _ = run(toy_config(tmp_path / "run", SETTINGS | {"steps": 3}), resume=True)
    assert first.step == 3  # a dead job is no obstacle


@pytest.mark.slow  # waits for time-outs, and compares the step times of ranks: wants a machine of its own
def test_a_slow_rank_is_named_and_a_hung_one_ends_the_job(tmp_path: Path) -> None:
    """Faults 9 and 10."""
    begin = time.monotonic()
    code, said = launch(torchrun(2), "slow_then_hung", tmp_path)
    assert code != 0
    assert time.monotonic() - begin < 200
    assert f"warning: rank 1 on {socket.gethostname()} is slow" in said
    slow = rows(tmp_path, "straggler")
    assert [(row["step"], row["rank"], row["host"]) for row in slow] == [
        (5, 1, socket.gethostname()),
        (10, 1, socket.gethostname()),
    ]
    assert slow[0]["seconds"] > 0.05
    for rank in (0, 1):
        stacks = (tmp_path / "run" / "stacks" / f"rank_{rank}.txt").read_text()
        assert stacks.startswith(f"rank {rank} of 2, host {socket.gethostname()}")
        assert re.search(r'File ".*trainer.py", line \d+ in _step' if rank == 0 else "in at_step", stacks)


def wait_for_steps(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "run" / "record.jsonl").exists() and len(rows(folder)) > 20:
            return
        time.sleep(0.2)
    process.terminate()
    raise AssertionError(f"no steps: {process.communicate(timeout=LIMIT)[1][-4000:]}")


def stop(folder: Path, launcher: list[str], scenario: str) -> tuple[subprocess.Popen[str], str]:
    with start(launcher, scenario, folder, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for_steps(folder, process)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=LIMIT)
        finally:
            if process.poll() is None:
                process.terminate()
    return process, said


@pytest.mark.slow  # the next test tells it, too
def test_sigterm_to_the_launcher_saves_on_all_ranks(tmp_path: Path) -> None:
    """Fault 7: the launcher passes the signal on; its own exit code is 1, whatever the ranks return."""
    _, said = stop(tmp_path, torchrun(2), "endless")
    found = [result(tmp_path, rank) for rank in (0, 1)]
    assert found[0]["interrupted"]
    assert found[0]["step"] == found[1]["step"]
    (folder,) = files.committed(tmp_path / "run" / "checkpoints")
    assert files.step_of(folder) == found[0]["step"]
    assert files.damage(folder) is None
    assert ": saved" in said


def test_sigterm_while_the_data_of_one_rank_cannot_be_read(tmp_path: Path, undisturbed: list[float]) -> None:
    """The other rank waits for it in the middle of a step; both save what they have before that step."""
    with start(torchrun(2), "away", tmp_path, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + LIMIT
        while not (tmp_path / "away").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LIMIT)
    found = [result(tmp_path, rank) for rank in (0, 1)]
    assert [(each["interrupted"], each["step"]) for each in found] == [(True, 25)] * 2, said[-4000:]
    assert ": saved" in said
    (folder,) = files.committed(tmp_path / "run" / "checkpoints")
    assert (files.step_of(folder), files.damage(folder)) == (25, None)
    resumed, _ = run(toy_config(tmp_path / "run", SETTINGS), resume=True)
    np.testing.assert_allclose(resumed.losses, undisturbed[25:], rtol=1e-5)


@pytest.mark.slow
def test_a_save_longer_than_the_launchers_patience(tmp_path: Path) -> None:
    """Fault 8: torchrun kills after 30 s unless it is told to wait longer."""
    stop(tmp_path, torchrun(2, "--shutdown-timeout=120"), "slow_save")
    (folder,) = files.committed(tmp_path / "run" / "checkpoints")
    assert files.step_of(folder) == result(tmp_path)["step"]
    other = tmp_path / "impatient"
    other.mkdir()
    stop(other, torchrun(2), "slow_save")
    assert files.committed(other / "run" / "checkpoints") == []


@pytest.mark.slow
def test_every_launcher_has_the_same_losses(tmp_path: Path) -> None:
    """Fault 17: torchrun, deepspeed on one host, and deepspeed as two hosts without ssh."""
    found = {}
    for name, command in {
        "torchrun": torchrun(2),
        "deepspeed": ["deepspeed", "--num_accelerators", "2"],
    }.items():
        (tmp_path / name).mkdir()
        code, said = launch(command, "plain", tmp_path / name)
        assert code == 0, said[-4000:]
        found[name] = result(tmp_path / name)["losses"]
    folder = tmp_path / "hosts"
    folder.mkdir()
    (folder / "hostfile").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = ["deepspeed", "--hostfile", str(folder / "hostfile"), "--no_ssh", "--master_addr", "127.0.0.1"]
    nodes = [
        start([*common, "--master_port", port, "--node_rank", str(node)], "plain", folder, stdout=subprocess.DEVNULL)
        for node in (0, 1)
    ]
    for node in nodes:
        _, said = node.communicate(timeout=LIMIT)
        assert node.returncode == 0, said[-4000:]
    found["two hosts"] = result(folder)["losses"]
    assert found["torchrun"] == found["deepspeed"] == found["two hosts"]


@pytest.mark.slow
def test_goodput(tmp_path: Path) -> None:
    """300 steps with five kill -9 of any rank at any moment: finishes alone, little is done twice."""
    for count in (1, 2):
        straight, folder = tmp_path / f"straight_{count}", tmp_path / f"disturbed_{count}"
        for each in (straight, folder):
            each.mkdir()
        code, said = launch(torchrun(count), "undisturbed", straight)
        assert code == 0, said[-4000:]
        code, said = launch(torchrun(count, "--max-restarts=5"), "goodput", folder)
        assert code == 0, said[-4000:]
        lives = len(list(folder.glob("once_life_*")))
        again = len((folder / "drawn").read_text().splitlines()) - 300
        print(f"{count} ranks: {lives} lives, {again} steps done again")
        assert lives == 6
        assert again <= 45
        losses = [{row["step"]: row["loss"] for row in rows(each)} for each in (straight, folder)]
        assert list(losses[0]) == list(range(1, 301))
        assert losses[0] == losses[1]

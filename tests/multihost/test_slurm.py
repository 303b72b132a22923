"""A real Slurm on two nodes: the rendered sbatch is preempted, saves, queues again and ends as an undisturbed run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts
from runs import ENVIRONMENT, LIMIT, events, losses, render, same
from slurm import Slurm, missing

pytestmark = pytest.mark.slow


@pytest.fixture
def slurm(hosts: Hosts, tmp_path: Path) -> Iterator[Slurm]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    made = Slurm(hosts, tmp_path / "slurm")
    yield made
    made.stop()


def submit(slurm: Slurm, demo: Any, out: Path) -> tuple[str, Path]:
    settings = ["partition=patient", "cpus=1", "time=30:00"]
    made = render("slurm", demo, out, 400, nodes=2, settings=settings)
    said = slurm.ask(f"sbatch {made.script}", ENVIRONMENT)
    match = re.fullmatch(r"Submitted batch job (\d+)", said.strip())
    assert match is not None, said
    return match[1], made.script.parent


def wait(condition: Any, what: str, folder: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        logs = "".join(path.read_text()[-3000:] for path in sorted((folder / "logs").glob("*.log")))
        assert time.monotonic() < deadline, f"{what}: not within {LIMIT} s\n{logs}"
        time.sleep(0.3)


def test_preempted_it_saves_queues_again_and_ends_as_undisturbed(
    slurm: Slurm, demo: Any, tmp_path: Path, one_host: dict[int, float]
) -> None:
    out = tmp_path / "run"
    job, folder = submit(slurm, demo, out)
    wait(lambda: max(losses(out), default=0) > 45, "45 steps", folder)
    urgent = slurm.ask("sbatch -p urgent -N2 --output=/dev/null --wrap 'sleep 3'").split()[-1]
    wait(lambda: slurm.job(job).get("JobState") in ("PENDING", "REQUEUED"), "requeued", folder)
    stopped = max(losses(out))
    wait(lambda: slurm.job(urgent).get("JobState") == "COMPLETED", "the urgent job", folder)
    wait(lambda: slurm.job(job).get("JobState") == "COMPLETED", "the end", folder)
    shown = slurm.job(job)
    assert (shown["Restarts"], shown["ExitCode"], shown["NumNodes"]) == ("1", "0:0", "2")
    (resumed,) = events(out, "resume")
    print(f"preempted and saved at step {stopped}, resumed at {resumed['step']} with {resumed['ranks']} ranks")
    assert resumed["step"] == stopped, "nothing was lost"
    same(losses(out), one_host, 400)
    logs = sorted((folder / "logs" / job).glob("node_*/*/attempt_0/0/stderr.log"))
    assert {path.parents[3].name for path in logs} == {"node_0", "node_1"}
    assert len(logs) == 4, "two starts, two nodes"


def test_the_signal_before_the_time_limit_queues_again_and_scancel_does_not(
    slurm: Slurm, demo: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job, folder = submit(slurm, demo, out)
    wait(lambda: max(losses(out), default=0) > 5, "5 steps", folder)
    slurm.ask(f"scancel --batch --signal=USR2 {job}")
    wait(lambda: slurm.job(job).get("Restarts") == "1", "requeued", folder)
    assert "signal: saving" in (folder / "logs" / f"{job}.log").read_text()
    stopped = max(losses(out))
    wait(lambda: max(losses(out)) > stopped + 5, "going on", folder)
    slurm.ask(f"scancel {job}")
    wait(lambda: slurm.job(job).get("JobState") == "CANCELLED", "cancelled", folder)
    wait(slurm.is_idle, "the end of the job's processes", folder)
    shown = slurm.job(job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "1")

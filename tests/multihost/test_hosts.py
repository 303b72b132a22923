"""Three hosts with addresses of their own: the rendered torchrun.sh and deepspeed.sh, and a host that is cut off."""

from __future__ import annotations

import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts
from runs import ENVIRONMENT, LIMIT, NAMES, STEP_TIMEOUT, events, finish, losses, render, same, wait_for_step

pytestmark = pytest.mark.slow


def no_rank_left(hosts: Hosts, name: str) -> bool:
    """Wait until no rank runs on a host. The brackets keep pgrep from finding the shell that runs it."""
    look = "timeout 60 bash -c 'while pgrep -f \"[u] -m bgen train\" > /dev/null; do sleep 1; done'"
    process = hosts.on(name, look)
    process.communicate(timeout=LIMIT)
    return process.returncode == 0


def first_failure(said: str, since: float) -> float:
    """Seconds from ``since`` (Unix) to the first rank's failure in what torchrun said, which is dated to the second."""
    clock, *_ = re.findall(r"^E\d{4} (\d\d:\d\d:\d\d)\.\d+ .*failed \(exitcode", said, re.M)
    began = datetime.fromtimestamp(since)
    failed = datetime.combine(began.date(), datetime.strptime(clock, "%H:%M:%S").time())
    return (failed - began.replace(microsecond=0)).total_seconds() % 86_400


def test_torchrun_meets_on_three_hosts(hosts: Hosts, demo: Any, tmp_path: Path, one_host: dict[int, float]) -> None:
    made = render("torchrun", demo, tmp_path / "run", 60)
    process = hosts.on("h0", f"bash {made.script} all", ENVIRONMENT)
    wait_for_step(tmp_path / "run", 1, process)
    look = "tr '\\0' '\\n' < /proc/$(pgrep -f '[t]orch.distributed.run' | head -1)/environ"
    variables, _ = hosts.on("h2", look).communicate(timeout=30)
    assert "BGEN_MARK=handed on" in variables
    finish(process)
    same(losses(tmp_path / "run"), one_host, 60)
    assert events(tmp_path / "run", "start")[0]["ranks"] == 3
    logs = sorted((made.script.parent / "logs").glob("node_*/*/attempt_0/0/stderr.log"))
    assert [log.parents[3].name for log in logs] == ["node_0", "node_1", "node_2"]
    assert not (made.script.parent / "environment.sh").exists()


def test_deepspeed_meets_by_hostfile_and_pdsh(
    hosts: Hosts, demo: Any, tmp_path: Path, one_host: dict[int, float]
) -> None:
    made = render("deepspeed", demo, tmp_path / "run", 60)
    process = hosts.on("h0", f"bash {made.script}", ENVIRONMENT)
    wait_for_step(tmp_path / "run", 1, process)
    # The brackets keep pgrep from finding the shell that runs it.
    look = "tr '\\0' '\\n' < /proc/$(pgrep -f '[m] bgen train' | tail -1)/environ"
    variables, _ = hosts.on("h1", look).communicate(timeout=30)
    assert "BGEN_MARK=handed on" in variables
    finish(process)
    same(losses(tmp_path / "run"), one_host, 60)
    assert events(tmp_path / "run", "start")[0]["ranks"] == 3
    assert len(list((made.script.parent / "logs").glob("*_rank*.log"))) == 3


def test_a_host_is_cut_off_and_the_others_go_on(
    hosts: Hosts, demo: Any, tmp_path: Path, one_host: dict[int, float]
) -> None:
    out = tmp_path / "run"
    made = render("torchrun", demo, out, 400, min_nodes=2, settings=[f"hosts={NAMES}", "join_timeout=60"])
    nodes = {
        name: hosts.on(name, f"bash {made.script} {number}", ENVIRONMENT) for number, name in enumerate(hosts.names)
    }
    wait_for_step(out, 45, nodes["h0"])
    hosts.cut("h2")
    cut = time.time()
    said = finish(nodes["h0"])
    finish(nodes["h1"])
    (resumed,) = events(out, "resume")
    assert resumed["ranks"] == 2
    assert resumed["step"] >= 40, "at most one interval is lost"
    noticed = first_failure(said, cut)
    back = resumed["time"] - cut
    print(f"noticed {noticed:.1f} s after the cut, training again after {back:.1f} s; time-out {STEP_TIMEOUT} s")
    assert noticed < STEP_TIMEOUT + 20
    same(losses(out), one_host, 400)
    # The lost host's rank has ended as well, its stacks are written. Its torchrun ends when the network is back.
    assert no_rank_left(hosts, "h2")
    assert "Timeout" in (out / "stacks" / "rank_2.txt").read_text()
    hosts.mend("h2")
    said, _ = nodes["h2"].communicate(timeout=LIMIT)
    assert nodes["h2"].returncode != 0, said[-2000:]


def test_a_host_is_cut_off_all_exit_and_the_next_start_resumes(
    hosts: Hosts, demo: Any, tmp_path: Path, one_host: dict[int, float]
) -> None:
    out = tmp_path / "run"
    made = render("deepspeed", demo, out, 400)
    process = hosts.on("h0", f"bash {made.script}", ENVIRONMENT)
    wait_for_step(out, 45, process)
    hosts.cut("h2")
    cut = time.monotonic()
    said, _ = process.communicate(timeout=LIMIT)
    ended = time.monotonic() - cut
    print(f"the launcher ended {ended:.1f} s after the cut, time-out {STEP_TIMEOUT} s, code {process.returncode}")
    assert process.returncode != 0, said[-4000:]
    assert ended < STEP_TIMEOUT + 90
    hosts.mend("h2")
    for name in hosts.names:  # the rank on the lost host has noticed as well
        assert no_rank_left(hosts, name)
    finish(hosts.on("h0", f"bash {made.script}", ENVIRONMENT))
    (resumed,) = events(out, "resume")
    assert resumed["step"] >= 40
    same(losses(out), one_host, 400)

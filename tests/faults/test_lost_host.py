"""Fault 11: two hosts, made of network namespaces; the cable between them is pulled in the middle of a run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from launching import HERE, LIMIT, environment, rows
from scenarios import SETTINGS
from toy import run, toy_config

pytestmark = pytest.mark.slow


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces with one cable."""
    names = [f"bgen-test-{number}" for number in (1, 2)]
    try:
        made = [ip("netns", "add", name) for name in names]
    except FileNotFoundError:
        made = [False]
    if not all(made):
        pytest.skip("network namespaces need root and iproute2")
    try:
        assert ip("link", "add", "veth1", "netns", names[0], "type", "veth", "peer", "name", "veth2", "netns", names[1])
        for number, name in enumerate(names, 1):
            assert ip("-n", name, "link", "set", f"veth{number}", "name", "cable")
            assert ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            assert ip("-n", name, "link", "set", "cable", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def start(hosts: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    variables = environment() | {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    processes = []
    for number, name in enumerate(hosts, 1):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400"]
        # Who hosts the meeting is told, because the namespaces do not know their addresses by name.
        meeting = f"--rdzv-conf=join_timeout=120,is_host={int(number == 1)}"
        command += [f"--local-addr=10.77.0.{number}", "--rdzv-id=test", meeting]
        command += [str(HERE / "scenarios.py"), "lost_node", str(folder)]
        with (folder / f"said_{number}").open("a") as said:
            processes.append(subprocess.Popen(command, env=variables, stdout=said, stderr=said, text=True))
    return processes


def stacks(folder: Path) -> list[str]:
    files = [folder / "run" / "stacks" / f"rank_{rank}.txt" for rank in (0, 1)]
    return [path.read_text() if path.exists() else "" for path in files]


def test_a_host_is_cut_off_and_the_job_goes_on_later(tmp_path: Path, hosts: list[str]) -> None:
    processes = start(hosts, tmp_path)
    try:
        deadline = time.monotonic() + LIMIT
        while not ((tmp_path / "run" / "record.jsonl").exists() and len(rows(tmp_path)) >= 30):
            assert time.monotonic() < deadline, (tmp_path / "said_1").read_text()
            assert processes[0].poll() is None, (tmp_path / "said_1").read_text()
            time.sleep(0.2)
        assert ip("-n", hosts[1], "link", "set", "cable", "down")
        (tmp_path / "cut").touch()
        begin = time.monotonic()
        while not all("Timeout" in text or "thread" in text for text in stacks(tmp_path)):
            assert time.monotonic() - begin < 60, stacks(tmp_path)
            time.sleep(0.2)
        print(f"both ranks knew {time.monotonic() - begin:.0f} s after the cable was pulled")
        assert processes[0].wait(120) != 0
        # The other host's agent waits for the meeting's host longer than anyone wants to, deaf to SIGTERM: its
        # scheduler ends it.
        processes[1].kill()
        processes[1].wait(60)
        assert ip("-n", hosts[1], "link", "set", "cable", "up")
        processes = start(hosts, tmp_path)
        assert [process.wait(LIMIT) for process in processes] == [0, 0], (tmp_path / "said_1").read_text()
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait(60)
    settings = SETTINGS | {"steps": 100, "checkpoint_every": 5}
    undisturbed = run(toy_config(tmp_path / "undisturbed", settings))[0].losses
    losses = {row["step"]: row["loss"] for row in rows(tmp_path)}
    np.testing.assert_allclose([losses[step] for step in range(1, 101)], undisturbed, rtol=1e-5)

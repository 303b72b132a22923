"""How much memory a process may still take, on machines that are made up of files."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from bgen.memory import free_memory

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "34 23 0:30 / /sys/fs/cgroup/memory rw,nosuid shared:12 - cgroup cgroup rw,memory"
NO_LIMIT = "9223372036854771712\n"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has 64,000 bytes available."""
    have = psutil.virtual_memory()._replace(available=64_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: have)


def host(root: Path, group: str, mount: str, files: dict[str, str]) -> Path:
    written = {"proc/self/cgroup": group + "\n", "proc/self/mountinfo": mount + "\n", **files}
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == 64_000
    group = "sys/fs/cgroup/pod"
    files = {f"{group}/memory.max": "max\n", f"{group}/memory.current": "9000\n"}
    assert free_memory(host(tmp_path, "0::/pod", V2, files)) == 64_000


def test_version_2(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/kube/pod"
    files = {f"{group}/memory.max": "50000\n", f"{group}/memory.current": "20000\n"}
    files[f"{group}/memory.stat"] = "anon 15000\nfile 5000\ninactive_file 4000\nactive_file 1000\n"
    root = host(tmp_path, "0::/kube/pod", V2, files)
    assert free_memory(root) == 34_000
    above = {"sys/fs/cgroup/kube/memory.max": "30000\n", "sys/fs/cgroup/kube/memory.current": "25000\n"}
    assert free_memory(host(root, "0::/kube/pod", V2, above)) == 5_000


def test_version_1(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/docker"
    files = {f"{group}/a/memory.limit_in_bytes": NO_LIMIT, f"{group}/a/memory.usage_in_bytes": "20000\n"}
    root = host(tmp_path, "5:memory:/docker/a", V1, files)
    assert free_memory(root) == 64_000
    above = {f"{group}/memory.limit_in_bytes": "30000\n", f"{group}/memory.usage_in_bytes": "28000\n"}
    above[f"{group}/memory.stat"] = "cache 900\ntotal_inactive_file 500\n"
    assert free_memory(host(root, "5:memory:/docker/a", V1, above)) == 2_500


def test_a_limit_that_is_passed_leaves_nothing(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/pod"
    files = {f"{group}/memory.max": "5000\n", f"{group}/memory.current": "9000\n"}
    assert free_memory(host(tmp_path, "0::/pod", V2, files)) == 0

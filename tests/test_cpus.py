"""How many CPUs bgen takes, and what it sets before torch and numba are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bgen import cpus
from bgen.cpus import cpu_quota

ROOT = Path(__file__).resolve().parent.parent
linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity")

V2 = "30 23 0:26 {top} {at} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 23 0:29 {top} {at} rw,nosuid shared:11 - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "34 23 0:30 / /sys/fs/cgroup/memory rw,nosuid shared:12 - cgroup cgroup rw,memory"
DISK = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"


def host(root: Path, groups: list[str], mounts: list[str], quotas: dict[str, str]) -> Path:
    """Write a made-up machine: lines of /proc/self/cgroup and mountinfo, and files of cgroups with what they hold."""
    files = {"proc/self/cgroup": "\n".join(groups) + "\n", "proc/self/mountinfo": "\n".join([DISK, *mounts]) + "\n"}
    for name, text in {**files, **quotas}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_no_cgroups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


def test_version_2(tmp_path: Path) -> None:
    mounts = [V2.format(top="/", at="/sys/fs/cgroup")]
    group = "sys/fs/cgroup/kubepods.slice/pod7"
    root = host(tmp_path, ["0::/kubepods.slice/pod7"], mounts, {f"{group}/cpu.max": "150000 100000\n"})
    assert cpu_quota(root) == 1.5
    host(tmp_path, ["0::/kubepods.slice/pod7"], mounts, {f"{group}/cpu.max": "max 100000\n"})
    assert cpu_quota(root) is None


@pytest.mark.parametrize("smallest", range(3))
def test_the_smallest_quota_from_the_group_to_the_top_counts(tmp_path: Path, smallest: int) -> None:
    folders = ["sys/fs/cgroup/a/b/c", "sys/fs/cgroup/a/b", "sys/fs/cgroup/a"]
    quotas = {f"{folder}/cpu.max": "800000 100000" for folder in folders}
    quotas[f"{folders[smallest]}/cpu.max"] = "250000 50000"
    quotas["sys/fs/cgroup/a/other/cpu.max"] = "10000 100000"
    root = host(tmp_path, ["0::/a/b/c"], [V2.format(top="/", at="/sys/fs/cgroup")], quotas)
    assert cpu_quota(root) == 5


def test_version_1(tmp_path: Path) -> None:
    groups = ["5:memory:/docker/abc", "4:cpu,cpuacct:/docker/abc", "3:cpuset:/other", "0::/user.slice"]
    mounts = [MEMORY, V1.format(top="/", at="/sys/fs/cgroup/cpu,cpuacct")]
    group = "sys/fs/cgroup/cpu,cpuacct/docker"
    own = {f"{group}/abc/cpu.cfs_quota_us": "-1\n", f"{group}/abc/cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(host(tmp_path, groups, mounts, own)) is None
    above = {f"{group}/cpu.cfs_quota_us": "30000\n", f"{group}/cpu.cfs_period_us": "10000\n"}
    assert cpu_quota(host(tmp_path, groups, mounts, above)) == 3


def test_a_container_without_a_namespace_of_its_own(tmp_path: Path) -> None:
    """It sees its path on the host, and its cgroup mounted at the top."""
    mounts = [V1.format(top="/docker/abc", at="/sys/fs/cgroup/cpu,cpuacct")]
    top = "sys/fs/cgroup/cpu,cpuacct"
    quota = {f"{top}/cpu.cfs_quota_us": "400000\n", f"{top}/cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(host(tmp_path, ["4:cpu,cpuacct:/docker/abc"], mounts, quota)) == 4


@pytest.mark.parametrize("path", ["/../../elsewhere", "/elsewhere"])
def test_a_path_outside_of_what_is_mounted(tmp_path: Path, path: str) -> None:
    mounts = [V2.format(top="/pods/abc", at=r"/mnt/c\040group")]
    assert cpu_quota(host(tmp_path, [f"0::{path}"], mounts, {"mnt/c group/cpu.max": "200000 100000\n"})) == 2


def test_both_versions(tmp_path: Path) -> None:
    groups = ["1:cpu,cpuacct:/job", "0::/job"]
    mounts = [V2.format(top="/", at="/sys/fs/cgroup/unified"), V1.format(top="/", at="/sys/fs/cgroup/cpu")]
    quotas = {
        "sys/fs/cgroup/unified/job/cpu.max": "600000 100000",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "700000",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
    }
    assert cpu_quota(host(tmp_path, groups, mounts, quotas)) == 6


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.5, 1), (1.9, 1), (3.0, 3), (64.0, 8)])
def test_whole_cpus(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr(cpus, "bound_to", lambda: 8)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert cpus.cpus() == expected


def environment(**settings: str) -> dict[str, str]:
    """Return the environment of a process for which nobody set how threads behave."""
    told = ("OMP_", "GOMP_", "KMP_", "MKL_", "NUMBA_", cpus.MARK)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    rest = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    return {**rest, "PYTHONPATH": paths, **settings}


def python(code: str, **settings: str) -> Any:
    """Run code in a process of its own, and return the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**settings), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


BOUND = """
import json, os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from bgen.cpus import cpus, cores
import torch
print(json.dumps([cpus(), cores(), torch.get_num_threads()]))
"""


@linux
def test_a_process_that_is_bound_to_one_cpu() -> None:
    assert python(BOUND) == [1, 1, 1]


STARTED = """
import json, os, runpy, sys
class Look:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numba"):
            print(json.dumps(dict(os.environ)), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Look())
sys.argv = ["bgen", "plan", "demo/vae"]
START
"""


@pytest.mark.parametrize(
    "start",
    [
        pytest.param("import bgen.nn.cpu.threads", id="import"),
        pytest.param("runpy.run_module('bgen', run_name='__main__')", id="command line"),
        pytest.param("import bgen.operate.doctor_rank", id="rank"),
        pytest.param("import data_tools.building.build", id="builds"),
    ],
)
def test_what_is_set_is_there_before_torch_and_numba_are_loaded(start: str) -> None:
    seen = python(STARTED.replace("START", start))
    assert (seen["GOMP_SPINCOUNT"], seen["KMP_BLOCKTIME"]) == ("1000", "1")
    assert seen["NUMBA_THREADING_LAYER_PRIORITY"] == "omp tbb workqueue"


SET = "import bgen, json, os; print(json.dumps(dict(os.environ)))"


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({}, {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "NUMBA_THREADING_LAYER_PRIORITY"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"NUMBA_THREADING_LAYER_PRIORITY"}),
        ({"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME", "NUMBA_THREADING_LAYER_PRIORITY"}),
        ({"KMP_BLOCKTIME": "0"}, {"GOMP_SPINCOUNT", "NUMBA_THREADING_LAYER_PRIORITY"}),
        ({"NUMBA_THREADING_LAYER": "workqueue"}, {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}),
        ({"NUMBA_THREADING_LAYER_PRIORITY": "tbb omp workqueue"}, {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}),
    ],
)
def test_what_the_user_set_stands(given: dict[str, str], ours: set[str]) -> None:
    found = python(SET, **given)
    assert {name: found[name] for name in given} == given
    told = ("OMP_", "GOMP_", "KMP_", "MKL_", "NUMBA_")
    assert {name for name in found if name.startswith(told)} - set(given) == ours


def prepare(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int = 8, modules: Any = None, **given: str
) -> dict[str, str]:
    """Return what is in the environment after bgen prepared it, on 8 CPUs."""
    monkeypatch.setattr(cpus, "bound_to", lambda: 8)
    monkeypatch.setattr(cpus, "cores", lambda: cores)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cpus, "sys", SimpleNamespace(modules=modules or {}))
    monkeypatch.setattr(os, "environ", dict(given))
    cpus.prepare()
    return dict(os.environ)


@pytest.mark.parametrize(
    ("quota", "cores", "given", "expected"),
    [
        (None, 8, {}, None),
        (3.7, 8, {}, "3"),
        (7.0, 4, {}, "4"),
        (3.0, 8, {"OMP_NUM_THREADS": "6"}, "6"),
        (3.0, 8, {"MKL_NUM_THREADS": "6"}, None),
    ],
)
def test_torch_starts_as_many_threads_as_the_quota_allows(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int, given: dict[str, str], expected: str | None
) -> None:
    assert prepare(monkeypatch, quota, cores, **given).get("OMP_NUM_THREADS") == expected
    assert cpus.threads_are_free() == (not given)


def test_a_program_that_bgen_starts_tells_bgens_settings_from_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(monkeypatch, 3.0, HOME="/home")
    assert first["OMP_NUM_THREADS"] == "3"
    assert cpus.without_ours(first) == {"HOME": "/home"}
    assert prepare(monkeypatch, 2.0, **first)["OMP_NUM_THREADS"] == "2"
    assert cpus.threads_are_free()
    users = {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "PASSIVE"}
    told = prepare(monkeypatch, 2.0, **{**first, **users})
    assert not cpus.threads_are_free()
    assert cpus.without_ours(told) == {"HOME": "/home", **users}
    assert not {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & told.keys()


class Torch:
    """A torch that is loaded already."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def get_num_threads(self) -> int:
        return self.threads

    def set_num_threads(self, threads: int) -> None:
        self.threads = threads


@pytest.mark.parametrize(
    ("before", "quota", "given", "after"),
    [
        (8, 3.0, {}, 3),
        (4, 3.0, {}, 3),  # one for each core
        (5, 3.0, {}, 5),  # the user's choice
        (8, 3.0, {"OMP_NUM_THREADS": "8"}, 8),
        (8, None, {}, 8),
    ],
)
def test_where_torch_is_loaded_already(
    monkeypatch: pytest.MonkeyPatch, before: int, quota: float | None, given: dict[str, str], after: int
) -> None:
    torch = Torch(before)
    numba = SimpleNamespace(config=SimpleNamespace(THREADING_LAYER_PRIORITY=["tbb", "omp", "workqueue"]))
    found = prepare(monkeypatch, quota, 4, {"torch": torch, "numba": numba}, **given)
    assert torch.threads == after
    assert numba.config.THREADING_LAYER_PRIORITY == ["omp", "tbb", "workqueue"]
    assert found["GOMP_SPINCOUNT"] == "1000"  # for programs that this one starts


def test_import_bgen_loads_nothing_but_the_standard_library() -> None:
    code = "import json, sys{}; print(json.dumps(dict.fromkeys(name.split('.')[0] for name in sys.modules)))"
    more = python(code.format(", bgen")).keys() - python(code.format("")).keys()
    assert more - sys.stdlib_module_names == {"bgen"}

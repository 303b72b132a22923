"""What `bgen launch --set` says of the network between hosts, in every file that it renders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bgen.errors import UserError
from bgen.operate.launch import Launch, launch

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {
    "torchrun": ["hosts=n0,n1"],
    "deepspeed": ["hosts=n0,n1"],
    "k8s": ["image=registry.example/bgen:1"],
    "jobset": ["image=registry.example/bgen:1"],
    "sky": [f"package={ROOT}"],
}


def render(target: str, **options: Any) -> Launch:
    overrides = ["out=/data/runs/run", "data.store=/data/store"]
    return launch("vae", target, nodes=2, ranks_per_node=4, overrides=overrides, **options)


def documents(made: Launch) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(made.script.read_text()))


def test_the_network_between_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("NCCL_", "GLOO_"))]:
        monkeypatch.delenv(name)
    network = ["interface=eth1", "hca==mlx5_0,mlx5_1"]
    wanted = {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1", "NCCL_IB_HCA": "=mlx5_0,mlx5_1"}
    lock = {"capabilities": {"add": ["IPC_LOCK"]}}
    for target in ("torchrun", "deepspeed", "slurm"):
        text = render(target, settings=[*NEEDED.get(target, []), *network]).script.read_text()
        exports = dict(re.findall(r'^export (\w+)="\$\{\1:-(.*)\}"$', text, re.M))
        assert wanted.items() <= exports.items()
    pods = {}
    for target in ("k8s", "jobset"):
        job = documents(render(target, settings=[*NEEDED[target], *network, "rdma=rdma/ib:8"]))[1]["spec"]
        if target == "k8s":
            (patch,) = job["runtimePatches"]
            node = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]
            env, resources = job["trainer"]["env"], job["trainer"]["resourcesPerNode"]
        else:
            node = job["replicatedJobs"][0]["template"]
            env, resources = (node["spec"]["template"]["spec"]["containers"][0][key] for key in ("env", "resources"))
        pods[target] = node["spec"]["template"]["spec"]["containers"][0]
        assert resources["requests"] == resources["limits"]
        assert resources["limits"]["rdma/ib"] == "8"
        assert pods[target]["securityContext"] == lock
        assert wanted.items() <= {entry["name"]: entry.get("value") for entry in env}.items()
    (task,) = documents(render("sky", settings=[*NEEDED["sky"], *network, "network_tier=best"]))
    assert task["resources"]["network_tier"] == "best"
    assert wanted.items() <= task["envs"].items()
    without = render("jobset", settings=NEEDED["jobset"], out=Path("without")).script.read_text()
    assert "securityContext" not in without
    assert "NCCL_IB_HCA" not in without
    with pytest.raises(UserError, match="rdma=ib: write the resource as the nodes offer it"):
        render("k8s", settings=[*NEEDED["k8s"], "rdma=ib"], out=Path("wrong"))
    assert not (tmp_path / "wrong").exists()

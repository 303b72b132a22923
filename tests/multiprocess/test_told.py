"""What two ranks tell each other in a step, by ZeRO stage, is what `bgen plan` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefork import torchrun
from test_ranks import launch, result

from bgen.operate.plan_step import Cluster, Work, step_time
from bgen.track.devices import DEVICES

OUT = {
    "all_reduce": lambda size, ranks: 2 * size * (ranks - 1) / ranks,
    "all_gather_into_tensor": lambda size, ranks: size * (ranks - 1),
    "reduce_scatter_tensor": lambda size, ranks: size * (ranks - 1) / ranks,
}
"""Bytes that leave a rank, of a collective that it gives so many."""


@pytest.mark.slow
def test_a_plan_sends_what_two_ranks_send(tmp_path: Path) -> None:
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    (tmp_path / "partition_everything.json").write_text(json.dumps(raw))
    done = launch(torchrun(2), "told", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = result(tmp_path)
    cluster = Cluster(1, 2, DEVICES["H100"], 50e9)
    for zero in range(4):
        work = Work(found["weights"], 1, 4, 2, zero, 1e15, elements=found["weights"] // 4)
        planned = step_time(work, cluster)
        moved = {kind: OUT[kind](row["bytes"], 2) for kind, row in found[str(zero)].items() if kind in OUT}
        gathered = moved.pop("all_gather_into_tensor", 0)
        # norms and flags are a few bytes; shares are padded
        assert gathered == pytest.approx(planned.gather * cluster.bandwidth, rel=0.01)
        assert sum(moved.values()) == pytest.approx(planned.reduce * cluster.bandwidth, rel=0.01)

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bgen.checkpoint import shards
from bgen.train.engine.partition import Partition


@pytest.mark.parametrize(("kernels", "place"), [("fused", "meta"), ("capturable", "meta"), ("foreach", "cpu")])
def test_the_step_counter_lies_where_the_optimisers_kernels_read_it(tmp_path: Path, kernels: str, place: str) -> None:
    """A fused AdamW on a GPU reads it there; the device "meta" stands for a GPU."""
    tensors = {
        shards.key(kind, 0, "weight"): torch.ones(6)
        for kind in (shards.WEIGHT, f"{shards.OPTIMIZER}exp_avg", f"{shards.OPTIMIZER}exp_avg_sq")
    }
    tensors[shards.key(shards.STEP, 0, "weight")] = torch.tensor(7.0)
    shards.write(tmp_path / shards.file_name(0), tensors, {"weight": (2, 3)})
    module = nn.Linear(3, 2, bias=False, device="meta")
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.param_groups[0][kernels] = True
    Partition(SimpleNamespace(optimizer=optimizer), module, 0).restore(shards.Shards(tmp_path))
    state = optimizer.state[module.weight]
    assert (state["step"].device.type, state["step"].dtype) == (place, torch.float32)
    assert state["exp_avg"].device.type == "meta"

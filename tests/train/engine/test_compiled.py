"""`train.compile`: blocks are compiled, once, and train as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from bgen.config.backbone import BackboneConfig
from bgen.models.backbones.registry import build_backbone
from bgen.track.record import read
from bgen.train.engine import compiled as module
from bgen.train.engine.compiled import blocks_of, compiled

# torch's tracer looks at the gradient of every tensor that it meets
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

HYBRID = "{name: hybrid, width: 32, layers: 1, time: {scale: 24.0, tokens: 2}, mamba2: {head_width: 16}}"


@pytest.fixture(autouse=True)
def without_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced is run as it was traced."""
    torch._dynamo.reset()
    monkeypatch.setattr(module, "BACKEND", "aot_eager")


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("demo/vae", []),
        pytest.param(
            "trajectories",
            [f"flow.backbone={HYBRID}", "data.trajectories={system: [donor], times: 3, cells: 16}", "train.ema=0"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_compiled_run_has_the_losses_of_one_that_is_not(
    stage: str, settings: list[str], bgen: Any, demo: Any, tmp_path: Path
) -> None:
    losses, traced = {}, {}
    for name in ("false", "true"):
        counters.clear()
        out = tmp_path / name
        common = [f"data.store={demo.store}", f"flow.vae={demo.vae}", f"out={out}", f"train.compile={name}"]
        common += [
            "train.steps=6",
            "train.global_batch=96",
            "train.log_every=1",
            "train.eval_every=0",
            "train.patience=0",
        ]
        done = bgen("train", stage, *common, *settings, "track.mlflow=false", "track.progress=false")
        assert done.code == 0, done
        losses[name] = [row["loss"] for row in read(out / "record.jsonl") if row["kind"] == "train"]
        traced[name] = counters["stats"]["unique_graphs"]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
    assert traced["false"] == 0
    assert traced["true"] > 0
    assert counters["recompiles"] == {}


def test_another_step_compiles_nothing_and_afterwards_nothing_is_compiled() -> None:
    config = BackboneConfig.model_validate({"name": "mlp", "width": 16, "layers": 2})
    network = build_backbone(5, config)
    assert len(blocks_of(network)) == 2
    inputs = torch.randn(8, 1, 1, 5), torch.rand(8, 1), torch.randn(8, 1, 16)
    counters.clear()
    with compiled(network):
        for _ in range(3):
            network(*inputs).sum().backward()
            seen = counters["stats"]["unique_graphs"]
        assert seen == 1  # blocks that are alike share it
        network(*inputs)
        assert counters["stats"]["unique_graphs"] == seen
    torch._dynamo.reset()
    network(*inputs)
    assert counters["stats"]["unique_graphs"] == seen
    with compiled(network, wanted=False):
        network(*inputs)
    assert counters["stats"]["unique_graphs"] == seen

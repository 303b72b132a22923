"""On data with structure in time, the backbone that mixes over time has the lowest held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bgen.config.load import load_config
from bgen.models.backbones.size import backbone_parameters, with_parameters
from bgen.track.record import read
from bgen.train.run import train

PARAMETERS = 125_000
LATENT = 10
COMMON = {
    "attention": {"heads": 4},
    "mamba2": {"head_width": 16, "state": 16},
    "time": {"scale": 24.0, "tokens": 4},
}
BACKBONES: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "layers": 4},
    "transformer": {"name": "transformer", "layers": 2},
    "hybrid": {"name": "hybrid", "layers": 2},
}
SEEDS = (0, 1, 2)
QUIET = ["track.mlflow=false", "track.progress=false"]


@pytest.mark.slow
def test_hybrid_beats_backbones_that_do_not_mix_over_time(bgen: Any, tmp_path: Path) -> None:
    """Lineages of simulated cell types; the flow is told the time, not the type: other time points tell it."""
    for arguments in (
        ["data", "simulate", "--preset", "demo", "--out", tmp_path / "cells.h5ad"],
        ["data", "build", tmp_path / "cells.h5ad", "--out", tmp_path / "store"],
        ["train", "demo/vae", f"data.store={tmp_path / 'store'}", f"out={tmp_path / 'vae'}", "train.steps=800", *QUIET],
    ):
        made = bgen(*arguments)
        assert made.code == 0, made.err
    configs = {name: with_parameters(LATENT + 1, COMMON | settings, PARAMETERS) for name, settings in BACKBONES.items()}
    sizes = {name: backbone_parameters(LATENT + 1, config) for name, config in configs.items()}
    assert max(sizes.values()) < 1.1 * min(sizes.values())
    found: dict[str, list[float]] = {}
    for name, backbone in configs.items():
        for seed in SEEDS:
            out = tmp_path / f"{name}-{seed}"
            overrides = [
                f"seed={seed}",
                f"data.store={tmp_path / 'store'}",
                f"out={out}",
                f"flow.vae={tmp_path / 'vae'}",
                "flow.conditions=[time]",
                f"flow.backbone={backbone.model_dump_json()}",
                "data.trajectories={system: [cell_type, donor], times: 5, cells: 8}",
                "train.steps=800",
                "train.global_batch=320",
                "train.learning_rate=2.0e-3",
                "train.ema=0.99",
                "train.eval_every=200",
                *QUIET,
            ]
            train(load_config("demo/flow", overrides))
            losses = [row["loss"] for row in read(out / "record.jsonl") if row["kind"] == "valid"]
            found.setdefault(name, []).append(losses[-1])
            print(f"{name:12} {sizes[name]:8,} parameters  seed {seed}  held-out loss {losses[-1]:.4f}", flush=True)
    for seed in SEEDS:
        assert found["hybrid"][seed] < found["transformer"][seed]
        assert found["hybrid"][seed] < found["mlp"][seed]

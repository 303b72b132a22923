"""The benchmark of training: figures that hang together, and a comparison that shows how costs grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bgen.bench.speed import mixers
from bgen.bench.speed.mixers import LATENT, compare, variants
from bgen.bench.speed.train_step import bench_train
from bgen.config.load import load_config
from bgen.models.backbones.size import backbone_parameters, with_parameters


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("demo/vae", []),
        ("demo/flow", []),
        (
            "demo/flow",
            ["flow.backbone={name: hybrid, width: 32, layers: 1}", "data.trajectories={times: 4, cells: 8}"],
        ),
        ("demo/flow", ["train.precision=bf16"]),
    ],
)
def test_a_configuration_is_timed(name: str, overrides: list[str]) -> None:
    found = bench_train(load_config(name, overrides), batch=64, genes=200, repetitions=2)
    assert json.loads(json.dumps(found)) == found
    seconds, rate, tflops = (found[key] for key in ("seconds", "cells_per_s", "tflops_per_s"))
    assert isinstance(seconds, float)
    assert seconds > 0
    assert rate == pytest.approx(64 / seconds)
    assert isinstance(tflops, float)
    assert tflops > 0
    assert found["mfu"] is None  # nobody says what a processor can do
    assert (found.get("T"), found.get("N")) == (
        (None, None) if name == "demo/vae" else (4, 8) if "traj" in str(overrides) else (1, 1)
    )


def test_mixers_are_compared_at_equal_parameters(tmp_path: Path) -> None:
    result: dict[str, Any] = compare(tmp_path, times=(2, 8), cells=(1, 2), limit=30)
    assert json.loads((tmp_path / "train.json").read_text()) == result
    assert (tmp_path / "train.png").stat().st_size > 10_000
    assert len(result["rows"]) == 4 * len(variants("cpu"))
    sizes = {row["parameters"] for row in result["rows"]}
    assert max(sizes) < 1.35 * min(sizes)


def test_what_would_take_too_long_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixers, "variants", lambda device: {"attention": variants(device)["attention"]})
    result = compare(tmp_path, times=(2, 64), cells=(1,), limit=1e-9)
    assert {row["T"] for row in result["rows"] if row["seconds"] is None} == {64}


def test_a_gpu_compares_plain_and_fused_kernels_at_equal_parameters() -> None:
    sizes = {
        name: backbone_parameters(LATENT, with_parameters(LATENT, settings, 10_000_000, 32))
        for name, settings in variants("cuda").items()
    }
    assert max(sizes.values()) < 1.25 * min(sizes.values())

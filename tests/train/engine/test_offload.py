"""Offload, Muon, pure bf16 and DeepSpeed's own tools: each trains, and goes on after a stop as if there was none."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import run, toy_config

from bgen.config.train import TrainConfig
from bgen.errors import UserError
from bgen.track import record
from bgen.train.engine.deepspeed_json import deepspeed_config

WITH_AIO = any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include"))


def halves(folder: Path, settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Losses of an uninterrupted run, and of one that was stopped at step 12 of 24 and resumed."""
    settings = {"steps": 24, "eval_every": 12} | settings
    straight, _ = run(toy_config(folder / "straight", settings))
    config = toy_config(folder / "halves", settings)
    first, _ = run(config, stop_after=12)
    second, stage = run(config, resume=True)
    assert first.interrupted
    assert {p.dtype for p in stage.module.parameters()} == {torch.float32}
    return straight.losses, first.losses + second.losses


@pytest.mark.parametrize("settings", [
    pytest.param({"zero": 1, "offload": {"optimizer": "cpu"}}, marks=pytest.mark.slow),
    pytest.param({"zero": 2, "offload": {"optimizer": "cpu"}, "ema": 0.9}, marks=pytest.mark.slow),
    {"zero": 3, "offload": {"optimizer": "cpu", "parameters": "cpu"}, "ema": 0.9, "micro_batch": 4},
])  # fmt: skip
def test_offload_to_the_cpu_changes_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain, _ = run(toy_config(tmp_path / "plain", {"steps": 24, "eval_every": 12}))
    straight, resumed = halves(tmp_path, settings)
    assert resumed == straight
    assert straight == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not WITH_AIO, reason="no libaio headers (package libaio-dev) for DeepSpeed to build async_io")
@pytest.mark.skipif(importlib.util.find_spec("ninja") is None, reason="no ninja to build with")
def test_offload_to_nvme_changes_nothing(tmp_path: Path) -> None:
    plain, _ = run(toy_config(tmp_path / "plain", {"steps": 24, "eval_every": 12}))
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    offload = {"optimizer": "nvme", "parameters": "nvme", "folder": tmp_path / "nvme"}
    straight, resumed = halves(tmp_path, {"zero": 3, "offload": offload, "deepspeed": raw})
    assert resumed == straight
    assert straight == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("settings", [
    pytest.param({"optimizer": "muon", "zero": 1}, marks=pytest.mark.slow),
    {"optimizer": "muon", "zero": 3},
    {"optimizer": "fused_adamw", "zero": 0, "schedule": "wsd"},
    pytest.param({"precision": "pure_bf16", "zero": 1, "micro_batch": 2, "ema": 0.9}, marks=pytest.mark.slow),
    {"precision": "pure_bf16", "zero": 3},
])  # fmt: skip
def test_other_optimisers_and_precisions_resume_exactly(tmp_path: Path, settings: dict[str, Any]) -> None:
    # torch would compile Muon's step for each shape, for most of a minute; at ZeRO 1 it does.
    with torch.compiler.set_stance("force_eager" if settings["zero"] == 3 else "default"):
        straight, resumed = halves(tmp_path, settings)
    assert resumed == straight
    plain, _ = run(toy_config(tmp_path / "plain", {"steps": 24, "eval_every": 12}))
    assert straight != plain.losses


def test_what_deepspeed_counts_and_profiles(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", {"steps": 200, "zero": 1, "comms_log": True, "flops_profile": 2})
    begin = time.perf_counter()
    result, _ = run(config)
    took = 1000 * (time.perf_counter() - begin)
    row = [row for row in record.read(result.record) if row.get("event") == "communication"][-1]
    kinds = [value for value in row.values() if isinstance(value, dict)]
    assert any(kind["calls"] > 0 and kind["bytes"] > 0 for kind in kinds)
    # One collective after the other took no longer than the whole run; sums of running totals would be many times that.
    assert 0 < sum(kind["ms"] for kind in kinds) < took
    assert "Flops Profiler" in (tmp_path / "run" / "flops.txt").read_text()


def test_contradictions_are_told_together() -> None:
    config = TrainConfig.model_validate(
        {"zero": 0, "precision": "pure_bf16", "offload": {"optimizer": "cpu", "parameters": "nvme"}}
    )
    with pytest.raises(UserError) as caught:
        deepspeed_config(config, 1)
    assert str(caught.value).splitlines() == [
        "The training settings contradict each other:",
        "  train.precision=pure_bf16 accumulates gradients in float32 only with train.zero=1 to 3",
        "  train.offload.optimizer=cpu needs train.zero=1 to 3",
        "  train.offload.parameters=nvme needs train.zero=3",
        "  offloading to nvme needs train.offload.folder, a folder on a local NVMe disk",
    ]
    with pytest.raises(UserError, match=r"train\.optimizer=muon needs train\.zero=1 to 3"):
        deepspeed_config(TrainConfig.model_validate({"zero": 0, "optimizer": "muon"}), 1)


def test_raw_json_is_merged_and_may_not_contradict(tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    config = TrainConfig.model_validate({"zero": 2, "deepspeed": raw})
    raw.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": True}, "prescale_gradients": True}))
    tree = deepspeed_config(config, 2)
    assert (tree["zero_optimization"]["stage"], tree["zero_optimization"]["overlap_comm"]) == (2, True)
    assert tree["prescale_gradients"] is True
    raw.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}, "gradient_clipping": 9}))
    with pytest.raises(UserError) as caught:
        deepspeed_config(config, 2)
    assert str(caught.value).splitlines() == [
        f"{raw} contradicts the configuration:",
        "  zero_optimization.stage: set train.zero instead",
        "  fp16: set train.precision (there is no float16) instead",
        "  gradient_clipping: set train.clip instead",
    ]
    raw.write_text("[1")
    with pytest.raises(UserError, match="is not valid JSON"):
        deepspeed_config(config, 2)
    raw.unlink()
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        deepspeed_config(config, 2)

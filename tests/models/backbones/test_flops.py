"""The formulas for floating-point operations against what torch counts as it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bgen.config.backbone import BackboneConfig
from bgen.models.backbones.registry import build_backbone
from bgen.models.backbones.size import backbone_flops
from bgen.nn.scans import ssd, ssd_torch

torch.set_num_threads(1)

CASES: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp"},
    "transformer": {"name": "transformer"},
    "set_transformer": {"name": "set_transformer", "cells": {"mixer": "set_attention", "inducing": 5}},
    "mamba2": {"name": "ssm", "mamba2": {"head_width": 8, "state": 4, "groups": 2}},
    "mamba2 causal fixed": {
        "name": "ssm",
        "time": {"direction": "causal", "tracked": True},
        "mamba2": {"head_width": 8, "state": 4, "rate": "fixed"},
    },
    "mamba1": {"name": "ssm", "time": {"mixer": "mamba1"}},
    "s4d": {"name": "ssm", "time": {"mixer": "s4d"}},
    "hyena": {"name": "ssm", "time": {"mixer": "hyena", "real_time": False}, "hyena": {"order": 3}},
    "attention": {"name": "ssm", "time": {"mixer": "attention", "tracked": True}},
    "hybrid": {"name": "hybrid", "mamba2": {"head_width": 8}},
    "tokens": {"name": "hybrid", "pattern": ["tokens", "cells", "none"], "tokens": {"count": 2}},
}


@pytest.fixture(autouse=True)
def products_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the scan is a compiled loop, which the counter does not see; in torch it is the same products."""
    monkeypatch.setattr(ssd, "ssd_cpu", ssd_torch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("T", "N", "masked"), [(1, 1, False), (3, 6, False), (3, 6, True), (130, 2, False)])
def test_formula_equals_count(case: str, T: int, N: int, masked: bool) -> None:
    config = BackboneConfig.model_validate({"width": 16, "layers": 2} | CASES[case])
    model = build_backbone(5, config).requires_grad_(False)
    mask = torch.ones(2, T, N, dtype=torch.bool) if masked else None
    # The counter does not know the CPU's fused attention kernel, so attention runs as its matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(2, T, N, 5), torch.rand(2, T), torch.randn(2, T, 16), mask, None)
    assert counter.get_total_flops() == model.flops(2, T, N) == backbone_flops(5, config, 2, T, N)


def test_state_space_models_grow_linearly_and_attention_quadratically() -> None:
    def growth(mixer: str) -> float:
        config = BackboneConfig.model_validate({"name": "ssm", "time": {"mixer": mixer, "tracked": True}})
        return backbone_flops(5, config, 1, 65536, 1) / backbone_flops(5, config, 1, 32768, 1)

    assert growth("mamba2") == pytest.approx(2, rel=1e-6)
    assert growth("attention") > 3.7

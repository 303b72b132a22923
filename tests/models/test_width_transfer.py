"""Coordinate check of muP: what a few steps of training change does not depend on the width, and would without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bgen.config.backbone import BackboneConfig
from bgen.config.flow import FlowConfig
from bgen.config.vae import VAEConfig
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE
from bgen.train.engine.parameter_groups import parameter_groups

BASE, WIDEST = 32, 256
CASES: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "layers": 2},
    "hybrid": {"name": "hybrid", "layers": 1, "time": {"tokens": 2}, "mamba2": {"head_width": 16, "state": 8}},
}


def flow(case: str, width: int, transfer: bool) -> LatentFlow:
    torch.manual_seed(0)
    settings = CASES[case] | {"width": width, "attention": {"heads": width // 16}}
    backbone = BackboneConfig.model_validate(settings | {"transfer_from": BASE if transfer else None})
    vae = VAE(VAEConfig(latent=3, hidden=8), 5, {})
    return LatentFlow(FlowConfig(backbone=backbone), vae, {"cell_type": 2}, {"time": (0.0, 1.0)})


def change(case: str, width: int, transfer: bool) -> float:
    """Mean absolute coordinate of the velocity after a few steps of Adam on fixed inputs; it is 0 before."""
    model = flow(case, width, transfer)
    groups = parameter_groups(model, 0.0)
    optimiser = torch.optim.AdamW([group | {"lr": 0.003 * group["lr_scale"]} for group in groups])
    g = torch.Generator().manual_seed(1)
    z, target = torch.randn(8, 3, 4, 4, generator=g), torch.randn(8, 3, 4, 4, generator=g)
    obs = {"cell_type": torch.arange(24) % 2, "time": torch.arange(24) / 24}
    hidden = torch.zeros(24, dtype=torch.bool)
    for _ in range(3):
        v = model.velocity(z, torch.full((8, 3), 0.5), model.conditions(obs, hidden).view(8, 3, -1))
        (v * target).mean().backward()  # linear: nothing turns a step that is too long back
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        v = model.velocity(z, torch.full((8, 3), 0.5), model.conditions(obs, hidden).view(8, 3, -1))
    return float(v.abs().mean())


@pytest.mark.parametrize("case", CASES)
def test_coordinates_move_alike_at_every_width(case: str) -> None:
    moved = [change(case, width, transfer=True) for width in (BASE, 2 * BASE, WIDEST)]
    assert max(moved) < 1.7 * min(moved)
    without = [change(case, width, transfer=False) for width in (BASE, WIDEST)]
    assert without[1] > 2.5 * without[0]
    assert without[0] == pytest.approx(moved[0], rel=1e-4)  # at the base width nothing changes


def test_what_is_scaled_and_how_it_decays() -> None:
    model = flow("hybrid", 128, transfer=True)
    scales = model.learning_rate_scales()
    assert set(scales.values()) == {BASE / 128}
    names = set(dict(model.named_parameters()))
    assert set(scales) <= names
    fixed = {"backbone.stem.weight", "backbone.flow_time.network.0.weight", "conditions.numbers.0.network.0.weight"}
    assert fixed <= names - set(scales)
    assert {"backbone.head.weight", "conditions.joint.weight"} <= set(scales)
    groups = parameter_groups(model, 0.1)
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.1, 1.0), (0.4, 0.25), (0.0, 1.0)]


def test_the_vaes_heads_start_smaller_and_its_gene_weights_are_left() -> None:
    def vae(transfer: int | None) -> VAE:
        torch.manual_seed(0)
        return VAE(VAEConfig(latent=2, hidden=64, transfer_from=transfer), 7, {"batch": 2})

    plain, wide = dict(vae(None).named_parameters()), dict(vae(16).named_parameters())
    changed = {name for name in plain if not torch.equal(plain[name], wide[name])}
    assert changed == {"encoder.head.weight", "decoder.logits.weight"}
    torch.testing.assert_close(wide["decoder.logits.weight"], plain["decoder.logits.weight"] / 2)
    scales = vae(16).learning_rate_scales()
    assert set(scales.values()) == {0.25}
    assert "encoder.weight" not in scales
    assert "decoder.stem.weight" not in scales
    assert {"encoder.blocks.0.inner.weight", "decoder.logits.weight"} <= set(scales)
    assert vae(None).learning_rate_scales() == {}

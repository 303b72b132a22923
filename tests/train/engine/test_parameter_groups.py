"""Exactly which parameters decay, model by model; what does not, stays float32 under autocast."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn

from bgen.config.backbone import BackboneConfig
from bgen.config.flow import FlowConfig
from bgen.config.train import TrainConfig
from bgen.config.vae import VAEConfig
from bgen.models.backbones.registry import build_backbone
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE
from bgen.train.engine.parameter_groups import parameter_groups, undecayed

ENDS = {"stem.weight", "head.weight"}
STACK = ENDS | {"flow_time.network.0.weight", "flow_time.network.2.weight"}
ATTENTION = {"q_proj.weight", "kv_proj.weight", "out_proj.weight"}
MLP = {"blocks.*.mixer.mixer.inner.weight", "blocks.*.mixer.mixer.outer.weight"}
MODULATION = {"blocks.*.modulation.project.weight"}


def under(prefix: str, names: set[str]) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


CELLS = under("blocks.*.mixer.mixer.attention", ATTENTION)
TOKENS = under("blocks.*.mixer.tokens.pool.attention", ATTENTION) | under("blocks.*.mixer.tokens.read", ATTENTION)
TIME = "blocks.*.mixer.tokens.mixer"
COMMON = STACK | MODULATION | MLP
IN_AND_OUT = {"in_proj.weight", "out_proj.weight"}

CASES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    # settings; what decays; last parts of the names of what does not, where they are not weights of norms or biases
    "mlp": (
        {"name": "mlp"},
        ENDS
        | under("time.network", {"0.weight", "2.weight"})
        | MODULATION
        | {"blocks.*.inner.weight", "blocks.*.outer.weight"},
        set(),
    ),
    "transformer": ({"name": "transformer"}, COMMON | CELLS, set()),
    "set_transformer": (
        {"name": "set_transformer", "cells": {"mixer": "set_attention", "inducing": 3}},
        COMMON
        | under("blocks.*.mixer.mixer.pool.attention", ATTENTION)
        | under("blocks.*.mixer.mixer.read", ATTENTION),
        {"seed_embedding"},
    ),
    "mamba2": (
        {"name": "ssm"},
        COMMON | TOKENS | under(TIME, IN_AND_OUT),
        {"A_log", "D", "dt_bias", "seed_embedding"},
    ),
    "mamba2 grid": (
        {"name": "ssm", "time": {"real_time": False}},
        COMMON | TOKENS | under(TIME, IN_AND_OUT),
        {"A_log", "D", "dt_bias", "seed_embedding", "convolution.weight"},
    ),
    "mamba1": (
        {"name": "ssm", "time": {"mixer": "mamba1"}},
        COMMON | TOKENS | under(TIME, IN_AND_OUT | {"x_proj.*.weight", "dt_proj.*.weight"}),
        {"A_log", "D", "seed_embedding"},
    ),
    "s4d": (
        {"name": "ssm", "time": {"mixer": "s4d"}},
        COMMON | TOKENS | under(TIME, {"out_proj.weight"}),
        {"A_log", "A_imag", "C", "D", "log_dt", "seed_embedding"},
    ),
    "hyena": (
        {"name": "ssm", "time": {"mixer": "hyena", "real_time": False}},
        COMMON | TOKENS | under(TIME, IN_AND_OUT | {"filter.hidden.*.weight", "filter.output.weight"}),
        {"frequency", "seed_embedding", "convolution.weight"},
    ),
    "hybrid": (
        {"name": "hybrid"},
        COMMON | TOKENS | CELLS | under(TIME, IN_AND_OUT),
        {"A_log", "D", "dt_bias", "seed_embedding"},
    ),
}
SMALL = {"width": 16, "layers": 1, "attention": {"heads": 2}, "mamba2": {"head_width": 8, "state": 4}}


def matching(names: set[str], patterns: set[str]) -> set[str]:
    unused = {pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)}
    assert not unused, f"there are no such parameters: {unused}"
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


@pytest.mark.parametrize("case", CASES)
def test_only_matrices_of_a_backbone_decay(case: str) -> None:
    settings, decayed, special = CASES[case]
    model = build_backbone(5, BackboneConfig.model_validate(SMALL | settings))
    names = {name for name, _ in model.named_parameters()}
    without = undecayed(model)
    assert names - without == matching(names, decayed)
    rest = {name for name in without if not name.endswith((".bias", "norm.weight"))}
    assert {name for name in rest if name.endswith(tuple(special) or "no special one")} == rest
    assert all(any(name.endswith(end) for name in rest) for end in special)


def test_of_the_vae_decay_the_gene_weights_and_the_layers() -> None:
    model = VAE(VAEConfig(latent=2, hidden=8, blocks=1, likelihood="zinb"), 7, {"batch": 3})
    blocks = {f"{part}.blocks.0.{end}.weight" for part in ("encoder", "decoder") for end in ("inner", "outer")}
    ends = {"encoder.weight", "encoder.head.weight", "decoder.stem.weight"}
    ends |= {"decoder.logits.weight", "decoder.dropout_logits.weight"}
    assert {name for name, _ in model.named_parameters()} - undecayed(model) == blocks | ends


def test_of_the_flow_embeddings_and_the_frozen_vae_do_not_decay() -> None:
    model = flow()
    conditions = {name for name in undecayed(model) if name.startswith("conditions.") and not name.endswith("bias")}
    assert conditions == {"conditions.categories.0.table.weight", "conditions.numbers.0.unknown"}
    decayed, rest = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in (decayed, rest) for p in group["params"]} == trained
    assert len(decayed["params"]) + len(rest["params"]) == len(trained)
    assert trained.isdisjoint(id(p) for p in model.vae.parameters())


def test_a_module_without_one_of_the_groups() -> None:
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(3), 0.1)] == [0.0]


def flow(**settings: Any) -> LatentFlow:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent=2, hidden=8), 7, {})
    backbone = BackboneConfig.model_validate(SMALL | settings)
    return LatentFlow(FlowConfig(backbone=backbone), vae, {"cell_type": 2}, {"time": (0.0, 1.0)})


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1", "s4d"])
def test_autocast_computes_in_bfloat16_and_leaves_every_parameter_in_float32(mixer: str) -> None:
    from bgen.distributed import world as ranks
    from bgen.train.engine.engine import Engine

    model = flow(name="hybrid", time={"mixer": mixer, "tokens": 2}).backbone
    train = TrainConfig.model_validate({"global_batch": 2, "precision": "bf16", "zero": 1})
    engine = Engine(Velocity(model), train, ranks.start())
    seen: dict[str, torch.dtype] = {}
    for name, module in engine.module.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, y.dtype))
    loss = engine.forward(torch.randn(2, 3, 4, 3))["loss"]  # type: ignore[arg-type]
    engine.backward(loss.mean())
    assert engine.step(1e-3).applied
    assert set(seen.values()) == {torch.bfloat16}
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.float32}
    assert loss.dtype == torch.float32


class Velocity(nn.Module):
    """A backbone as the engine takes modules: from a batch, here bare latents, to losses per item."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        v = self.backbone(z, torch.full(z.shape[:2], 0.5), torch.zeros(*z.shape[:2], 16))
        return {"loss": (v.float() - z).square().mean(dim=(1, 2, 3))}

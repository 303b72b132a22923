"""The named sizes have as many parameters as they say, counted without memory for them."""

from __future__ import annotations

import pytest
import torch

from bgen.config.flow import MemberSizes
from bgen.config.load import load_config
from bgen.config.run import Config
from bgen.models.backbones.size import backbone_parameters, with_parameters
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE

SIZES = {"small": 10e6, "base": 100e6, "large": 1e9, "xl": 3e9}


def configured(size: str, stage: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    file = tmp_path_factory.mktemp("sizes") / "own.yaml"
    file.write_text(f"extends: [{stage}, sizes/{size}]\n", encoding="utf-8")
    return load_config(file)


def vae_parameters(config: Config, genes: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VAE(config.vae, genes, {"batch": 10}).parameters())


def flow_parameters(config: Config) -> int:
    return backbone_parameters(config.vae.latent + 1, config.flow.backbone)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_what_they_are_called(size: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    of_courses = configured(size, "trajectories", tmp_path_factory)
    assert {"time", "cells"} <= set(of_courses.flow.backbone.axes)
    of_cells = configured(f"cells/{size}", "flow", tmp_path_factory)
    assert of_cells.flow.backbone.axes == ("none",)
    assert of_cells.vae == of_courses.vae
    for config in (of_courses, of_cells):
        assert flow_parameters(config) == pytest.approx(SIZES[size], rel=0.15)
    assert vae_parameters(configured(size, "vae", tmp_path_factory), 20_000) == pytest.approx(SIZES[size], rel=0.15)


def test_tiny_is_under_a_million(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert flow_parameters(configured("tiny", "trajectories", tmp_path_factory)) < 1e6
    assert flow_parameters(configured("cells/tiny", "flow", tmp_path_factory)) < 1e6
    assert vae_parameters(configured("tiny", "vae", tmp_path_factory), 2_000) < 1e6


def test_backbones_of_equal_size() -> None:
    for settings in ({"name": "mlp"}, {"name": "hybrid", "mamba2": {"head_width": 16}}):
        assert backbone_parameters(11, with_parameters(11, settings, 2_000_000)) == pytest.approx(2_000_000, rel=0.1)


def test_the_trajectories_configuration_is_whole() -> None:
    config = load_config("trajectories")
    assert config.data.trajectories is not None
    assert config.train.global_batch % config.data.trajectories.size == 0


def test_the_largest_flow_along_perturbations_needs_no_memory_to_trace(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = configured("xl", "perturbation", tmp_path_factory)
    sizes = MemberSizes(members=1000, labels=1200, largest=2, names=20_000, vector=16, amount=None, forget=0.2)
    B, T, N = 4, 2, 32
    with torch.device("meta"):
        flow = LatentFlow(config.flow, VAE(config.vae, 20_000, {}), {}, {}, {"perturbation": sizes})
        flow = flow.to("meta")  # a few tables are made in memory
        codes = torch.zeros(B * T, dtype=torch.int64)
        condition, acting = flow.conditions.with_acting({"perturbation": codes}, codes > 0, codes)
        z, mask = torch.zeros(B, T, N, flow.size), torch.ones(B, T, N, dtype=torch.bool)
        outputs = flow.backbone(z, torch.zeros(B, T), condition.view(B, T, -1), mask)
        (outputs.sum() + flow.shift(acting).sum()).backward()
    assert outputs.shape == (B, T, N, 3 * flow.size)  # of each kind of start
    own = flow.conditions.member_embeddings["perturbation"].own.weight.grad
    assert own is not None
    assert own.shape == (1000, config.flow.backbone.width)

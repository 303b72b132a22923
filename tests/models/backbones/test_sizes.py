"""The named sizes have as many parameters as they say, counted without memory for them."""

from __future__ import annotations

import pytest
import torch

from bgen.config.load import load_config
from bgen.config.run import Config
from bgen.models.backbones.size import backbone_parameters, with_parameters
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
    assert flow_parameters(configured(size, "flow", tmp_path_factory)) == pytest.approx(SIZES[size], rel=0.15)
    assert vae_parameters(configured(size, "vae", tmp_path_factory), 20_000) == pytest.approx(SIZES[size], rel=0.15)


def test_tiny_is_under_a_million(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert flow_parameters(configured("tiny", "flow", tmp_path_factory)) < 1e6
    assert vae_parameters(configured("tiny", "vae", tmp_path_factory), 2_000) < 1e6


def test_backbones_of_equal_size() -> None:
    for settings in ({"name": "mlp"}, {"name": "hybrid", "mamba2": {"head_width": 16}}):
        assert backbone_parameters(11, with_parameters(11, settings, 2_000_000)) == pytest.approx(2_000_000, rel=0.1)


def test_the_trajectories_configuration_is_whole() -> None:
    config = load_config("trajectories")
    assert config.data.trajectories is not None
    assert config.train.global_batch % config.data.trajectories.size == 0

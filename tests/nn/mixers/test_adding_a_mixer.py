"""A mixer that does not come with bgen, added as bgen/nn/mixers/README.md says, trained, exported and loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bgen.config.backbone as settings
import bgen.nn.mixers.registry as registry
from bgen.config.backbone import CELL_MIXERS, TIME_MIXERS, BackboneConfig, MixerConfig, TimeConfig
from bgen.config.flow import SampleConfig
from bgen.config.load import load_config
from bgen.config.section import PositiveFloat
from bgen.errors import UserError
from bgen.hub.directory import SavedModel, load_directory
from bgen.models.backbones.registry import build_backbone
from bgen.models.backbones.size import backbone_flops
from bgen.models.generators.latent_flow import LatentFlow, Places
from bgen.nn.decay import decays
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.points import Points
from bgen.track.record import read
from bgen.train.engine.parameter_groups import undecayed


class SmoothingConfig(MixerConfig):
    """A toy."""

    rate: PositiveFloat = Field(1.0, description="How fast a time point forgets the others, a unit of time.")

    def misfits(self, width: int, *, real_time: bool) -> list[str]:
        """Refuse grids."""
        return [] if real_time else ["time.real_time: smoothing is over real time"]


class Smoothing(Mixer):
    """y_t = sum over s of k(t - s) W x_s / sum over s of k(t - s), k(d) = exp(-rate |d|)."""

    decayed = ("weight",)

    def __init__(self, width: int, config: SmoothingConfig, time: TimeConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.log_rate = nn.Parameter(torch.full((1,), math.log(config.rate)))

    def forward(self, x_BLD: Tensor, points: Points) -> Tensor:
        """See Mixer."""
        B, L, _ = x_BLD.shape
        times = points.time_BL if points.time_BL is not None else torch.arange(float(L)).expand(B, L)
        valid = torch.ones(B, L, dtype=torch.bool) if points.valid_BL is None else points.valid_BL
        times = torch.where(valid, times, 0.0)
        kernel_BLS = (-self.log_rate.exp() * (times[:, :, None] - times[:, None]).abs()).exp() * valid[:, None]
        weight_BLS = kernel_BLS / kernel_BLS.sum(-1, keepdim=True).clamp_min(1e-9)
        return weight_BLS @ (points.blank(x_BLD) @ self.weight)

    def flops(self, B: int, L: int) -> int:
        """See Mixer."""
        D = len(self.weight)
        return 2 * B * L * D * D + 2 * B * L * L * D


BACKBONE: dict[str, Any] = {
    "name": "ssm",
    "width": 16,
    "layers": 1,
    "attention": {"heads": 2},
    "time": {"mixer": "smoothing", "scale": 24.0, "tokens": 2},
    "smoothing": {"rate": 0.5},
}


@pytest.fixture(scope="module")
def smoothing(adding: Any) -> Any:
    """The toy, registered."""
    adding.line(settings, "TIME_MIXERS", "smoothing", SmoothingConfig)
    adding.line(
        registry,
        "TIME_MIXERS",
        "smoothing",
        lambda config: Smoothing(config.width, config.settings(SmoothingConfig), config.time),
    )
    return adding


@pytest.fixture(scope="module")
def run(smoothing: Any, bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run through the command line."""
    out = tmp_path_factory.mktemp("smoothing") / "run"
    done = bgen(
        *["train", "trajectories", f"out={out}", f"data.store={demo.store}", f"flow.vae={demo.vae}"],
        "data.trajectories={system: [donor], times: 3, cells: 16}",
        "flow.backbone={name: ssm, width: 16, layers: 1, attention: {heads: 2}}",
        "flow.backbone.time={mixer: smoothing, scale: 24.0, tokens: 2}",
        "flow.backbone.smoothing.rate=0.5",
        *["train.steps=80", "train.global_batch=96", "train.learning_rate=1.0e-2", "train.warmup=2"],
        *["train.log_every=20", "train.eval_every=0", "train.ema=0", "track.mlflow=false", "track.progress=false"],
    )
    assert done.code == 0, done
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> SavedModel:
    return load_directory(run / "model")


def test_a_mixer_touches_three_files(smoothing: Any) -> None:
    assert smoothing.touched == 3


def test_the_registries_of_mixers_and_of_their_settings_have_the_same_names(smoothing: Any) -> None:
    assert list(registry.TIME_MIXERS) == list(TIME_MIXERS)
    assert list(registry.CELL_MIXERS) == list(CELL_MIXERS)


def test_it_learns(run: Path, model: SavedModel) -> None:
    losses = [row["loss"] for row in read(run / "record.jsonl") if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    (mixer,) = (part for part in model.module.modules() if isinstance(part, Smoothing))
    assert float(mixer.log_rate.detach().exp()) != pytest.approx(0.5, rel=1e-5)


def test_its_settings_come_back_with_the_exported_model(model: SavedModel) -> None:
    assert isinstance(model.module, LatentFlow)
    assert model.module.config.backbone.settings(SmoothingConfig) == SmoothingConfig(rate=0.5)
    conditions = {"time": torch.zeros(2, 3)}
    keys = torch.arange(24).view(2, 3, 4)
    places = {"mask": torch.ones(2, 3, 4, dtype=torch.bool), "time": torch.tensor([[0.0, 24.0, 30.0]]).expand(2, -1)}
    made = model.module.sample_trajectories(conditions, keys, SampleConfig(steps=2), Places(**places))
    assert made.isfinite().all()


def test_mistakes_in_its_settings_are_named(smoothing: Any) -> None:
    for override, said in (
        ("flow.backbone.smoothing.rat=1", "flow.backbone.smoothing.rat: unknown key. Did you mean 'rate'?"),
        ("flow.backbone.smoothing.rate=0", "flow.backbone.smoothing.rate: Input should be greater than 0"),
        ("flow.backbone.smoothin.rate=1", "flow.backbone.smoothin: unknown key. Did you mean 'smoothing'?"),
        ("flow.backbone.time.mixer=smooth", "'attention' or 'smoothing' (it is 'smooth')"),
        (
            "flow.backbone={name: ssm, time: {mixer: smoothing, real_time: false}}",
            "time.real_time: smoothing is over real time",
        ),
    ):
        with pytest.raises(UserError) as caught:
            load_config("flow", [override])
        assert said in str(caught.value)


def test_it_says_what_decays(smoothing: Any) -> None:
    backbone = build_backbone(5, BackboneConfig.model_validate(BACKBONE))
    mixer = "blocks.0.mixer.tokens.mixer"
    names = {name for name, _ in backbone.named_parameters() if name.startswith(mixer)}
    assert names & undecayed(backbone) == {f"{mixer}.log_rate"}
    assert names - undecayed(backbone) == {f"{mixer}.weight"}


def test_one_that_does_not_say_what_decays_is_refused() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2))

    with pytest.raises(TypeError, match=r"Forgetful owns the parameter 'weight'.*'decayed'"):
        decays(Forgetful(), "weight")


@pytest.mark.parametrize("masked", [False, True])
def test_its_formula_is_what_torch_counts(smoothing: Any, masked: bool) -> None:
    config = BackboneConfig.model_validate(BACKBONE)
    backbone = build_backbone(5, config).requires_grad_(False)
    mask = torch.ones(2, 3, 4, dtype=torch.bool) if masked else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backbone(torch.randn(2, 3, 4, 5), torch.rand(2, 3), torch.randn(2, 3, 16), mask, None)
    assert counter.get_total_flops() == backbone.flops(2, 3, 4) == backbone_flops(5, config, 2, 3, 4)

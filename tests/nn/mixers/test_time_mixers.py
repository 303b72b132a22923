"""What every mixer over time must do: respect masks, direction, packing and real time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bgen.config.backbone import AttentionConfig, HyenaConfig, Mamba1Config, Mamba2Config, S4DConfig, TimeConfig
from bgen.nn.mixers.attention import TimeAttention
from bgen.nn.mixers.hyena import Hyena
from bgen.nn.mixers.mamba1 import Mamba1
from bgen.nn.mixers.mamba2 import Mamba2
from bgen.nn.mixers.s4d import S4D
from bgen.nn.points import Points

torch.set_num_threads(1)
D = 8

Make = Callable[[TimeConfig], nn.Module]
MAMBA2 = Mamba2Config(head_width=4, state=4)
MAKERS: dict[str, Make] = {
    "mamba2": lambda time: Mamba2(D, MAMBA2, time),
    "mamba2_fixed": lambda time: Mamba2(D, Mamba2Config(head_width=4, state=4, groups=2, rate="fixed"), time),
    "mamba1": lambda time: Mamba1(D, Mamba1Config(state=4), time),
    "s4d": lambda time: S4D(D, S4DConfig(state=8), time),
    "s4d_conv": lambda time: S4D(D, S4DConfig(state=8, form="convolutional"), time),
    "hyena": lambda time: Hyena(D, HyenaConfig(max_length=32, filter_width=8), time),
    "attention": lambda time: TimeAttention(D, AttentionConfig(heads=2), time),
}
IRREGULAR = [name for name in MAKERS if name not in ("s4d_conv", "hyena")]
PACKABLE = IRREGULAR


def make(name: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    mixer = MAKERS[name](TimeConfig.model_validate(settings)).double()
    for parameter in mixer.parameters():  # away from special values such as zero biases
        parameter.data += 0.05 * torch.randn_like(parameter)
    return mixer


def series(T: int = 9, B: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(T)
    time = (torch.rand(B, T, generator=g, dtype=torch.float64) + 0.2).cumsum(1)
    return torch.randn(B, T, D, generator=g, dtype=torch.float64), time


def grid_or_real(name: str) -> list[bool]:
    return [False, True] if name in IRREGULAR else [False]


CASES = [(name, real) for name in MAKERS for real in grid_or_real(name)]


@pytest.mark.parametrize(("name", "real"), CASES)
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_masked_points_influence_nothing(name: str, real: bool, direction: str) -> None:
    mixer = make(name, real_time=real, direction=direction)
    x, time = series()
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, [0, 3, 8]] = False
    valid[1, 5:] = False
    other, later = torch.where(valid[..., None], x, torch.nan), torch.where(valid, time, torch.nan)
    y = mixer(x, Points(valid, time))
    z = mixer(other, Points(valid, later if real else time))
    assert torch.equal(y[valid], z[valid])
    assert (mixer(x, Points(None, time)) - y)[valid].abs().max() > 1e-4


@pytest.mark.parametrize(("name", "real"), CASES)
def test_direction(name: str, real: bool) -> None:
    x, time = series()
    changed = x.clone()
    changed[:, 5] += 1
    for direction, sees_the_future in (("causal", False), ("bidirectional", True)):
        mixer = make(name, real_time=real, direction=direction)
        difference = (mixer(x, Points(None, time)) - mixer(changed, Points(None, time))).abs().amax((0, 2))
        if name != "attention" or direction == "bidirectional":
            assert difference[6:].min() > 1e-7
        assert difference[5] > 1e-3
        assert (difference[:5].min() > 1e-9) == sees_the_future
        assert sees_the_future or difference[:5].max() < 1e-14


@pytest.mark.parametrize("name", MAKERS)
def test_past_and_future_are_told_apart(name: str) -> None:
    """A bidirectional mixer of a series run backwards is not its result run backwards (attention's is, by design)."""
    mixer = make(name, real_time=name in IRREGULAR, direction="bidirectional")
    x, time = series()
    points = Points(None, time)
    symmetric = torch.allclose(mixer(x, points), mixer(x.flip(1), points.reversed()).flip(1), atol=1e-9)
    assert not symmetric or name == "attention"


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_packed_equals_separate(name: str, real: bool, direction: str) -> None:
    mixer = make(name, real_time=real, direction=direction)
    x, time = series(11, B=1)
    cuts = [(0, 2), (2, 3), (3, 11)]
    sequence = torch.cat([torch.full((1, j - i), k) for k, (i, j) in enumerate(cuts)], dim=1)
    packed = mixer(x, Points(None, time, sequence))
    apart = torch.cat([mixer(x[:, i:j], Points(None, time[:, i:j])) for i, j in cuts], dim=1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-12)
    assert (mixer(x, Points(None, time)) - apart).abs().max() > 1e-4


@pytest.mark.parametrize("name", IRREGULAR)
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_inserting_an_unobserved_point(name: str, direction: str) -> None:
    mixer = make(name, direction=direction)
    x, time = series(6)
    keep = torch.tensor([0, 1, 2, 4, 5, 6])
    valid = torch.zeros(2, 7, dtype=torch.bool).index_fill(1, keep, True)
    longer = torch.randn(2, 7, D, dtype=torch.float64).index_copy(1, keep, x)
    between = ((time[:, 2] + time[:, 3]) / 2)[:, None].expand(2, 7).index_copy(1, keep, time)
    found = mixer(longer, Points(valid, between))[:, keep]
    torch.testing.assert_close(found, mixer(x, Points(None, time)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mamba2_fixed", "s4d"])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_inserting_an_observed_point_without_input(name: str, direction: str) -> None:
    """Stronger: the state runs through the point, its gap adds to the next. Needs a rate that no input sets."""
    x, time = series(6)
    keep = torch.tensor([0, 1, 2, 4, 5, 6])
    longer = x.new_zeros(2, 7, D).index_copy(1, keep, x)
    between = ((time[:, 2] + time[:, 3]) / 2)[:, None].expand(2, 7).index_copy(1, keep, time)

    def change(**settings: object) -> float:
        mixer = make(name, direction=direction, **settings)
        with torch.no_grad():
            for parameter_name, parameter in mixer.named_parameters():
                if parameter_name in ("dt_bias", "log_dt"):
                    parameter.fill_(0.0)  # steps well above the floor
            return float((mixer(longer, Points(None, between))[:, keep] - mixer(x, Points(None, time))).abs().max())

    assert change() < 1e-10
    assert change(real_time=False) > 1e-4  # places for times: the property is seen to fail


@pytest.mark.parametrize("name", IRREGULAR)
def test_only_differences_of_time_matter(name: str) -> None:
    mixer = make(name)
    x, time = series()
    y = mixer(x, Points(None, time))
    torch.testing.assert_close(mixer(x, Points(None, time + 1000)), y, rtol=0, atol=1e-9)
    assert (mixer(x, Points(None, 2 * time)) - y).abs().max() > 1e-5
    assert (mixer(x, Points()) - y).abs().max() > 1e-5


@pytest.mark.parametrize("name", MAKERS)
def test_no_times_means_places(name: str) -> None:
    x, _ = series()
    for real in grid_or_real(name):
        mixer = make(name, real_time=real)
        places = torch.arange(9, dtype=torch.float64).expand(2, 9)
        torch.testing.assert_close(mixer(x, Points()), mixer(x, Points(None, places)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "real"), CASES)
def test_one_point_float32_and_autocast(name: str, real: bool) -> None:
    mixer = make(name, real_time=real).float()
    x, time = series(1)
    assert mixer(x.float(), Points(None, time.float())).shape == (2, 1, D)
    x, time = series(9)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 5:] = False
    points = Points(valid, time.float())
    exact = mixer.double()(x, Points(valid, time))[valid]
    single = mixer.float()(x.float(), points)[valid]
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() < 1e-4 * (1 + exact.abs().max())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = mixer(x.float(), points)
    half.float().square().sum().backward()
    assert (half[valid] - exact).abs().max() < 0.1 * (1 + exact.abs().max())
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.dtype == torch.float32
        # Every row does something, those of the backward direction too.
        assert parameter.grad.reshape(len(parameter), -1).abs().sum(1).min() > 0, parameter_name


def test_s4d_holds_its_input_over_a_unit_of_time() -> None:
    """Zero-order hold: for a constant input the sum at the places is the integral of the state equation, exactly."""
    mixer = make("s4d")
    assert isinstance(mixer, S4D)
    step, gain = mixer.exponents()
    rate = torch.complex(-mixer.A_log.exp(), mixer.A_imag)
    places = torch.arange(6, dtype=torch.float64)
    summed = (step[None] * places[:, None, None]).exp().sum(0) * gain[0]
    integral = torch.view_as_complex(mixer.C)[0] * ((step * 6).exp() - 1) / rate  # of C exp(A s), s from 0 to 6 dt
    torch.testing.assert_close(summed, integral)

"""What every backbone promises, on random inputs, each promise shown to be broken by a mixer that breaks it.

Axes: B trajectories, T time points, N cells per time point, D latent size, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgen.config.backbone import BackboneConfig
from bgen.errors import UserError
from bgen.models.backbones import along
from bgen.models.backbones.registry import build_backbone
from bgen.nn.decay import decays
from bgen.nn.mixers.mamba1 import Mamba1
from bgen.nn.mixers.mamba2 import Mamba2
from bgen.nn.mixers.s4d import S4D
from bgen.nn.points import Points

torch.set_num_threads(1)
B, T, N, D, W = 2, 5, 4, 3, 16

SMALL: dict[str, Any] = {
    "width": W,
    "layers": 2,
    "attention": {"heads": 2},
    "mamba2": {"head_width": 4, "state": 4},
    "mamba1": {"state": 4},
    "s4d": {"state": 4},
    "hyena": {"max_length": 16, "filter_width": 8},
    "cells": {"inducing": 3},
}
GRID = {"real_time": False}
CASES: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp"},
    "transformer": {"name": "transformer"},
    "set_transformer": {"name": "set_transformer", "cells": {"mixer": "set_attention", "inducing": 3}},
    "ssm mamba2": {"name": "ssm", "time": {"tokens": 3}},
    "ssm mamba2 fixed": {"name": "ssm", "time": {"tokens": 3}, "mamba2": SMALL["mamba2"] | {"rate": "fixed"}},
    "ssm mamba2 grid": {"name": "ssm", "time": {"tokens": 3} | GRID},
    "ssm mamba1": {"name": "ssm", "time": {"tokens": 3, "mixer": "mamba1"}},
    "ssm s4d": {"name": "ssm", "time": {"tokens": 3, "mixer": "s4d"}},
    "ssm s4d grid": {
        "name": "ssm",
        "time": {"tokens": 3, "mixer": "s4d"} | GRID,
        "s4d": {"state": 4, "form": "convolutional"},
    },
    "ssm hyena grid": {"name": "ssm", "time": {"tokens": 3, "mixer": "hyena"} | GRID},
    "ssm attention": {"name": "ssm", "time": {"tokens": 3, "mixer": "attention"}},
    "ssm tracked": {"name": "ssm", "time": {"tracked": True}},
    "hybrid": {"name": "hybrid", "time": {"tokens": 3}},
    "hybrid other pattern": {"name": "hybrid", "pattern": ["cells", "time", "cells"], "time": {"tokens": 3}},
    "tokens": {"name": "hybrid", "pattern": ["tokens", "none"], "tokens": {"count": 2}},
    "hybrid with tokens": {
        "name": "hybrid",
        "pattern": ["tokens", "time", "cells", "none"],
        "tokens": {"count": 2},
        "time": {"tokens": 3},
    },
    "hybrid tracked": {"name": "hybrid", "time": {"tracked": True, "mixer": "attention"}},
}
OVER_TIME = [case for case in CASES if case.split()[0] in ("ssm", "hybrid")]
ANY_TIMES = [case for case in OVER_TIME if not case.endswith("grid")]
ON_GRID = [case for case in OVER_TIME if case.endswith("grid")]
ALONE = ["mlp", "tokens"]  # each cell by itself
TRACKED = [case for case in CASES if case.endswith("tracked")]

Broken = Callable[[nn.Module], nn.Module]


def build(case: str, broken: Broken | None = None, **time: Any) -> nn.Module:
    """A backbone with every parameter random (at its start it would be the zero function), perhaps broken."""
    torch.manual_seed(0)
    settings = SMALL | CASES[case]
    settings = settings | {"time": settings.get("time", {}) | time}
    model = build_backbone(D, BackboneConfig.model_validate(settings)).double()
    if broken is not None:
        for module in list(model.modules()):
            if isinstance(module, along.AlongCells | along.AlongTimeBySlot):
                module.mixer = broken(module.mixer)
            elif isinstance(module, along.AlongTimeByTokens):
                module.tokens.mixer = broken(module.tokens.mixer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def inputs(case: str, length: int = T) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    gap = torch.ones(B, length) if case.endswith("grid") else torch.rand(B, length, generator=g) + 0.3
    return {
        "z": normal(B, length, N, D),
        "t": torch.rand(B, length, generator=g, dtype=torch.float64),
        "condition": normal(B, length, W),
        "mask": torch.ones(B, length, N, dtype=torch.bool),
        "time": gap.double().cumsum(1),
    }


def holds(value: Tensor) -> bool:
    return bool(value.detach().abs().max() < 1e-10)


# The promises. Each returns by how much it is broken.


def permuting_one_time_point(model: nn.Module, case: str) -> Tensor:
    given = inputs(case)
    given["mask"][0, 2, 3] = False
    order = torch.tensor([2, 0, 3, 1])
    permuted = {k: v.clone() for k, v in given.items()}
    for name in ("z", "mask"):
        permuted[name][:, 2] = given[name][:, 2, order]
    expected = model(**given)
    expected[:, 2] = expected[:, 2, order]
    return model(**permuted) - expected


def permuting_all_time_points(model: nn.Module, case: str) -> Tensor:
    given = inputs(case)
    given["mask"][0, 2, 3] = False
    order = torch.tensor([2, 0, 3, 1])
    permuted = given | {name: given[name][:, :, order] for name in ("z", "mask")}
    return model(**permuted) - model(**given)[:, :, order]


def what_masked_cells_do(model: nn.Module, case: str) -> Tensor:
    given = inputs(case)
    given["mask"][0, 1, 2:] = False
    given["mask"][1, 3] = False  # a whole time point
    given["mask"][1, 4, 0] = False
    other = given | {"z": torch.where(given["mask"][..., None], given["z"], 7.0)}
    absent = ~given["mask"].any(-1)
    other["t"] = torch.where(absent, 0.123, given["t"])
    other["condition"] = torch.where(absent[..., None], -3.0, given["condition"])
    return (model(**other) - model(**given))[given["mask"]]


def what_padding_does(model: nn.Module, case: str) -> Tensor:
    """Append a cell and a time point that do not exist."""
    given = inputs(case)
    given["mask"][0, 1, 2:] = False
    padded = inputs(case, T + 1)
    padded["z"] = torch.randn(B, T + 1, N + 1, D, dtype=torch.float64)
    padded["mask"] = torch.zeros(B, T + 1, N + 1, dtype=torch.bool)
    for name, value in given.items():
        if name in ("z", "mask"):
            padded[name][:, :T, :N] = value
        else:
            padded[name][:, :T] = value
    return (model(**padded)[:, :T, :N] - model(**given))[given["mask"]]


def what_the_future_does(model: nn.Module, case: str) -> Tensor:
    given = inputs(case)
    later = {k: v.clone() for k, v in given.items()}
    for name in ("z", "t", "condition"):
        later[name][:, 3:] += 0.3
    later["mask"][0, 3, 1:] = False
    return (model(**later) - model(**given))[:, :3]


def inserting_an_unobserved_time_point(model: nn.Module, case: str) -> Tensor:
    given, longer = inputs(case), inputs(case, T + 1)
    keep = torch.tensor([0, 1, 2, 4, 5])
    for name, value in given.items():
        longer[name][:, keep] = value
    longer["mask"][:, 3] = False
    longer["time"][:, 3] = given["time"][:, 2:4].mean(1)
    return model(**longer)[:, keep] - model(**given)


# What breaks them.


class Positions(nn.Module):
    """Adds to every point what belongs to its place."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, points: Points) -> Tensor:
        return self.mixer(x + torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)[:, None], points)


class Unmasked(Positions):
    """Does not look at the mask."""

    def forward(self, x: Tensor, points: Points) -> Tensor:
        return self.mixer(x, Points(None, points.time_BL))


class Neighbours(Positions):
    """Adds a convolution over places."""

    def forward(self, x: Tensor, points: Points) -> Tensor:
        return self.mixer(points.blank(x) + 0.5 * points.blank(x).roll(1, dims=1), points)


class Leaking(Positions):
    """Lets every point see the last one."""

    def forward(self, x: Tensor, points: Points) -> Tensor:
        return self.mixer(x, points) + x[:, -1:]


class GapOfPlaces(Positions):
    """Takes an unobserved place for one unit of time."""

    def forward(self, x: Tensor, points: Points) -> Tensor:
        return self.mixer(x, Points(points.valid_BL, torch.arange(x.shape[1]).expand(x.shape[:2])))


@pytest.mark.parametrize("case", [case for case in CASES if case not in TRACKED])
def test_permuting_the_cells_of_one_time_point(case: str) -> None:
    assert holds(permuting_one_time_point(build(case), case))


@pytest.mark.parametrize("case", CASES)
def test_permuting_the_cells_of_all_time_points(case: str) -> None:
    assert holds(permuting_all_time_points(build(case), case))


@pytest.mark.parametrize("case", TRACKED)
def test_tracked_backbones_pair_slots(case: str) -> None:
    assert not holds(permuting_one_time_point(build(case), case))


@pytest.mark.parametrize("case", ["transformer", "hybrid", "set_transformer"])
def test_permuting_is_seen_to_fail(case: str) -> None:
    def broken(mixer: nn.Module) -> nn.Module:
        return Positions(mixer)

    if case == "transformer":
        assert not holds(permuting_all_time_points(build(case, broken), case))
    # Positions over time break nothing here: only the mixers along cells must not have them.
    assert not holds(permuting_one_time_point(build(case, broken), case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_masked_cells_influence_nothing(case: str, direction: str) -> None:
    model = build(case, direction=direction)
    assert holds(what_masked_cells_do(model, case))
    assert holds(what_padding_does(model, case))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ALONE])
def test_masks_are_seen_to_fail(case: str) -> None:
    assert not holds(what_padding_does(build(case, Unmasked), case))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ALONE])
def test_values_under_masks_are_seen_to_fail(case: str) -> None:
    class Blind(nn.Module):
        def forward(self, mask: Tensor, **others: Tensor) -> Tensor:
            return model(**others)

    model = build(case)
    assert not holds(what_masked_cells_do(Blind(), case))


@pytest.mark.parametrize("case", CASES)
def test_what_stands_in_masked_cells_may_be_nan(case: str) -> None:
    given = inputs(case)
    given["mask"][0, 1, 2:] = False
    given["mask"][1, 4] = False
    given["z"] = torch.where(given["mask"][..., None], given["z"], torch.nan)
    model = build(case)
    output = model(**given)
    assert output[given["mask"]].isfinite().all()
    if case != "mlp":
        assert output[~given["mask"]].abs().max() == 0
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_causal_backbones_do_not_see_the_future(case: str) -> None:
    assert holds(what_the_future_does(build(case, direction="causal"), case))


@pytest.mark.parametrize("case", OVER_TIME)
def test_causality_is_seen_to_fail(case: str) -> None:
    assert not holds(what_the_future_does(build(case, direction="bidirectional"), case))
    assert not holds(what_the_future_does(build(case, Leaking, direction="causal"), case))


@pytest.mark.parametrize("case", OVER_TIME)
def test_time_points_hear_of_each_other(case: str) -> None:
    model, given = build(case), inputs(case)
    other = given | {"z": given["z"].clone()}
    other["z"][0, 1, 2] += 1
    difference = (model(**other) - model(**given)).detach().abs()
    reached = difference[0] if case not in TRACKED or "hybrid" in case else difference[0, :, 2]
    assert reached.amax(-1).min() > 1e-9
    assert difference[1].max() == 0


@pytest.mark.parametrize("case", [*ALONE, "transformer", "set_transformer", *ANY_TIMES])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_inserting_an_unobserved_time_point(case: str, direction: str) -> None:
    assert holds(inserting_an_unobserved_time_point(build(case, direction=direction), case))


@pytest.mark.parametrize("case", ANY_TIMES)
@pytest.mark.parametrize("broken", [Unmasked, Neighbours, GapOfPlaces])
def test_insertion_is_seen_to_fail(case: str, broken: Broken) -> None:
    assert not holds(inserting_an_unobserved_time_point(build(case, broken), case))


@pytest.mark.parametrize("case", ON_GRID)
def test_what_needs_a_regular_grid_refuses_another(case: str) -> None:
    model, given = build(case), inputs(case)
    model(**given)
    model(**given | {"time": None})
    irregular = given | {"time": inputs("ssm mamba2")["time"]}
    with pytest.raises(UserError, match=r"time points one unit of time apart.*time_scale"):
        model(**irregular)
    scaled = build(case, scale=24.0)
    torch.testing.assert_close(scaled(**given | {"time": 24 * given["time"]}), model(**given), rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="one unit"):
        scaled(**given)


@pytest.mark.parametrize("case", ANY_TIMES)
def test_real_time_matters_and_must_ascend(case: str) -> None:
    model, given = build(case), inputs(case)
    assert not holds(model(**given | {"time": 3 * given["time"]}) - model(**given))
    assert holds(model(**given | {"time": given["time"] + 50}) - model(**given))
    scaled = build(case, scale=3.0)
    torch.testing.assert_close(scaled(**given | {"time": 3 * given["time"]}), model(**given), rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="ascend"):
        model(**given | {"time": given["time"].flip(1)})


def tie_directions(model: nn.Module) -> None:
    """Give the backward runs the forward runs' parameters."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Mamba2):
                maps = module.split[2:5]
                start = 2 * module.inner
                forward = module.in_proj.weight[start : start + sum(maps)]
                module.in_proj.weight[start + sum(maps) :] = forward
                module.dt_bias[1] = module.dt_bias[0]
            elif isinstance(module, Mamba1):
                for pair in (module.x_proj, module.dt_proj):
                    pair[1].load_state_dict(pair[0].state_dict())
            elif isinstance(module, S4D):
                module.C[1] = module.C[0]


def running_time_backwards(model: nn.Module, case: str) -> Tensor:
    given = inputs(case)
    given["mask"][0, 1] = False
    backwards = {k: v.flip(1) for k, v in given.items()} | {"time": -given["time"].flip(1)}
    return model(**backwards).flip(1) - model(**given)


@pytest.mark.parametrize("case", [case for case in ANY_TIMES if case not in ("ssm attention", "hybrid tracked")])
def test_the_reverse_direction_uses_recomputed_gaps(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(case)
    tie_directions(model)
    assert holds(running_time_backwards(model, case))

    def with_flipped_gaps(self: Points) -> Points:
        assert self.time_BL is not None
        gap = torch.cat([self.time_BL[:, :1] * 0, self.time_BL.diff(dim=1)], dim=1).flip(1)
        return Points(None if self.valid_BL is None else self.valid_BL.flip(1), gap.cumsum(1))

    monkeypatch.setattr(Points, "reversed", with_flipped_gaps)
    assert not holds(running_time_backwards(model, case))


@pytest.mark.parametrize("case", CASES)
def test_float32_shapes_gradients_and_recomputation(case: str) -> None:
    model, given = build(case).float(), inputs(case)
    given = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    y = model(**given)
    assert y.shape == (B, T, N, D)
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    if case == "mlp":
        return
    model.config = model.config.model_copy(update={"recompute": True})  # type: ignore[union-attr, operator]
    model.zero_grad()
    model(**given).square().sum().backward()
    for before, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**given).isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_a_static_cell_and_the_start(case: str) -> None:
    settings = BackboneConfig.model_validate(SMALL | CASES[case])
    torch.manual_seed(0)
    model = build_backbone(D, settings)
    y = model(torch.randn(3, 1, 1, D), torch.rand(3, 1), torch.randn(3, 1, W), None, None)
    assert y.shape == (3, 1, 1, D)
    assert y.abs().max() == 0


def test_tokens_of_a_latent_state_are_told_apart_and_hear_of_each_other() -> None:
    """A token that changes reaches all others of its cell, and no other cell; two tokens that hold the same differ."""
    model, given = build("tokens"), inputs("tokens")
    other = given | {"z": given["z"].clone()}
    other["z"][0, 1, 2, 0] += 1
    difference = (model(**other) - model(**given)).detach().abs()
    assert difference[0, 1, 2].min() > 1e-9
    difference[0, 1, 2] = 0
    assert difference.max() == 0
    alike = given | {"z": torch.ones(B, T, N, D, dtype=torch.float64)}
    first, second, _ = model(**alike)[0, 0, 0]
    assert abs(first - second) > 1e-6


def test_latents_that_cannot_be_split_are_refused() -> None:
    config = BackboneConfig.model_validate(SMALL | CASES["tokens"] | {"tokens": {"count": 3}})
    with pytest.raises(UserError, match="a latent state of 4 dimensions cannot be split into 3 tokens"):
        build_backbone(5, config)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_says_whether_it_decays(case: str) -> None:
    for module in build(case).modules():
        for name, _ in module.named_parameters(recurse=False):
            assert decays(module, name) in (True, False)

"""What runs on a GPU when cells are generated, traced for CUDA from inputs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import SETS, B, G, N, T, along_time, cells, flow, vae
from on_cuda import CUDA, Trace

from bgen.config.flow import SampleConfig
from bgen.errors import UserError
from bgen.models.generators.latent_flow import LatentFlow, Places

SETTINGS: dict[str, dict[str, Any]] = {
    "euler": {"solver": "euler", "steps": 3},
    "heun": {"solver": "heun", "steps": 2, "guidance": 2.0},
    "midpoint": {"solver": "midpoint", "steps": 2, "guidance": 2.0, "guidance_interval": (0.2, 0.8)},
    "adaptive": {"solver": "adaptive"},
}

OF_COURSES: dict[str, Callable[[], LatentFlow]] = {
    "mamba2": lambda: along_time("mamba2"),
    "perturbation": lambda: flow({"name": "mlp"}, SETS, source="neighbours"),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("autocast", [False, True])
def test_static_cells_are_traced_to_their_counts(name: str, autocast: bool, cuda: None) -> None:
    trace = Trace()
    model = trace.module(flow({"name": "mlp"}, codec=vae(likelihood="zinb")).eval())
    told = {name: column for name, column in cells().obs.items() if name in model.conditions.names}
    conditions, keys, library = (trace.on_host(given) for given in (told, torch.arange(B), torch.ones(B)))
    with trace(autocast=autocast), torch.no_grad():
        latents = model.sample(conditions, B, keys, SampleConfig.model_validate(SETTINGS[name]), library)
        z, log_library = model.vae.unwhiten(latents)
        covariates = {"batch": conditions["batch"].to(CUDA, non_blocking=True)}
        decoded = model.vae.decode(z, log_library.exp(), covariates)
        counts = decoded.sample(keys.to(CUDA, non_blocking=True))
    assert (latents.device, latents.dtype, latents.shape) == (CUDA, torch.float32, (B, 5))
    assert (counts.device, counts.dtype, counts.shape) == (CUDA, torch.int32, (B, G))
    assert decoded.mean.dtype == torch.float32


@pytest.mark.parametrize("name", OF_COURSES)
def test_courses_are_traced_from_what_is_observed(name: str, cuda: None) -> None:
    trace, shape = Trace(), (B // (T * N), T, N)
    model = trace.module(OF_COURSES[name]().eval())
    told = {
        "batch": torch.zeros(shape[:2], dtype=torch.int64),
        "guide": torch.zeros(shape[:2], dtype=torch.int64),
        "dose": torch.zeros(shape[:2]),
        "time": torch.zeros(shape[:2]),
    }
    told = {name: column for name, column in told.items() if name in model.conditions.names}
    seen = torch.arange(T).expand(shape[:2]) == 0
    places = Places(torch.ones(shape, dtype=torch.bool), torch.zeros(shape[:2]), seen, torch.zeros(*shape, 5))
    conditions, keys, on_device = (
        trace.on_host(told),
        trace.on_host(torch.arange(B).view(shape)),
        trace.on_host(places),
    )
    with trace():
        made = model.sample_trajectories(conditions, keys, SampleConfig(steps=2, solver="euler"), on_device.to(CUDA))
    assert (made.device, made.dtype, made.shape) == (CUDA, torch.float32, (*shape, 5))


def test_times_are_looked_at_where_they_are_on_the_cpu() -> None:
    model, shape = along_time("mamba2"), (1, T, N)
    places = Places(torch.ones(shape, dtype=torch.bool), torch.arange(T).float().flip(0)[None])
    with pytest.raises(UserError, match="times must ascend"):
        model.sample_trajectories({}, torch.arange(T * N).view(shape), SampleConfig(steps=1), places)

"""Where the host may wait for the GPU, and why: the one list. All else that waits fails a test of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Allowed:
    """A function that may wait; ``instead`` returns what it returns, without values. None: it is not traced."""

    place: str
    reason: str
    instead: Callable[..., Any] | None = None


ALLOWED = (
    Allowed(
        "bgen.models.generators.latent_flow.start",
        "Optimal transport is solved on the host: cells go there and starts come back, once a micro batch.",
        lambda z, mask, time, observed, noise, seeds: noise.clone(),
    ),
    Allowed(
        "bgen.models.generators.latent_flow.couple",
        "The pairing of cells is solved on the host, as above.",
        lambda z0, z1, mask, moving: z1.clone(),
    ),
    Allowed(
        "bgen.models.likelihoods.sampling.negative_binomial_quantile",
        "Counts are drawn once a cell, after all steps of the solver. Nearly all entries are zero and leave the walk "
        "at once; without looking how many are left, each of hundreds of steps would cost as much as the first.",
        lambda uniforms, mu, theta: torch.zeros(mu.shape, dtype=torch.int32, device=mu.device),
    ),
    Allowed(
        "bgen.tasks.perturb.perturb.change_counts",
        "Counts of perturbed cells are drawn once a cell, as above: only genes that fall are thinned.",
        lambda counts, before, after, keys: torch.zeros(counts.shape, device=before.logits.device),
    ),
    Allowed(
        "torchdiffeq.odeint",
        "solver=adaptive only: it looks at its error after every step, to choose the next.",
        lambda v, z, ends, **_: torch.stack([z, z + v(1.0, z)]),
    ),
    Allowed(
        "bgen.train.step_losses.StepLosses.take",
        "The record: one copy of all losses since its last row, every train.log_every steps.",
    ),
    Allowed(
        "bgen.train.diagnose.norms.LayerNorms.take",
        "train.norms only: one copy of the norms of all layers, in the steps that are looked at.",
    ),
    Allowed(
        "bgen.train.engine.engine.Engine.step",
        "Once an optimiser step, when both passes are under way: weights move only if all gradients are finite, and "
        "DeepSpeed, too, asks for their norm.",
    ),
    Allowed(
        "bgen.train.trainer.Trainer._step",
        "train.skip_spikes only: whether a loss is a spike must be known before its gradient counts.",
    ),
    Allowed(
        "bgen.train.trainer.Trainer._skipped",
        "A step that is not applied, which is rare: its cells go into the record, with where the first NaN came from.",
    ),
)


def allow(patch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in the place of what may wait."""
    for allowed in ALLOWED:
        if allowed.instead is not None:
            patch.setattr(allowed.place, allowed.instead)

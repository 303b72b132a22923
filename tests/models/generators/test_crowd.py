"""Where only the population tells the answer, attention over cells has it, and a network of single cells cannot.

A share of the control cells of a context stands aside, on either side, so that the mean does not show it. All cells
answer a perturbation as strongly as that share is large.

Axes: B contexts, T = 2 (control, then perturbed), N cells, D = 2 dimensions: where a cell stands, and its answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bgen.config.backbone import BackboneConfig
from bgen.config.flow import FlowConfig, PatternsConfig, SampleConfig
from bgen.data.batch import CellBatch
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.models.generators.latent_flow import LatentFlow, Places
from bgen.models.measured_latents import MeasuredLatents
from bgen.order.keys import hash_keys

B, N, D, STEPS = 16, 32, 2, 100


def contexts(seed: int) -> tuple[Tensor, Tensor]:
    """Return cells ``[B, 2, N, D]`` of new contexts, and how strongly each answers ``[B]``."""
    rng = np.random.default_rng(seed)
    share = rng.random(B)
    aside = np.arange(N) < np.round(share[:, None, None] * N)
    cells = 0.3 * rng.standard_normal((B, 2, N, D))
    cells[..., 0] += rng.choice([-1.5, 1.5], (B, 2, N)) * aside
    cells[:, 1, :, 1] += 3 * share[:, None]
    return torch.from_numpy(cells).float(), torch.from_numpy(3 * share).float()


def batch(cells: Tensor, step: int) -> TrajectoryBatch:
    n = cells.shape[:3].numel()
    keys = torch.from_numpy(hash_keys(5, step, np.arange(n)).view(np.int64))
    empty = CellBatch(torch.zeros(n + 1, dtype=torch.int64), torch.zeros(0).int(), torch.zeros(0), 1, keys, keys)
    control = torch.tensor([True, False]).expand(B, 2)
    found = TrajectoryBatch.of(empty, torch.ones(B, 2, N, dtype=torch.bool), torch.arange(2.0).expand(B, 2), control)
    found.whitened = cells.reshape(n, D)
    return found


def error(backbone: dict[str, Any]) -> float:
    """Train, and return the squared error of the mean answers of contexts that training never saw."""
    torch.manual_seed(0)
    config = FlowConfig(
        backbone=BackboneConfig.model_validate({"width": 32, "layers": 2, "attention": {"heads": 2}} | backbone),
        source="neighbours",
        patterns=PatternsConfig(noise=0, forecast=0, interpolate=0, perturb=1),
    )
    flow = LatentFlow(config, MeasuredLatents(torch.zeros(1, D)), {}, {}).train()
    optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], 3e-3)
    for step in range(STEPS):
        loss = flow(batch(contexts(step)[0], step))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cells, answer = contexts(10_000)
    seen = torch.tensor([True, False]).expand(B, 2)
    places = Places(torch.ones(B, 2, N, dtype=torch.bool), torch.arange(2.0).expand(B, 2), seen, cells)
    keys = torch.arange(B * 2 * N).view(B, 2, N)
    made = flow.eval().sample_trajectories({}, keys, SampleConfig(steps=4), places)
    moved = made[:, 1, :, 1].mean(1) - cells[:, 0, :, 1].mean(1)
    return float((moved - answer).square().mean())


def test_attention_over_cells_hears_what_no_cell_knows() -> None:
    torch.set_num_threads(1)
    alone = error({"name": "mlp"})
    together = error({"name": "hybrid", "pattern": ["cells", "none"]})
    spread = float(contexts(10_000)[1].var())  # the error of the mean answer
    assert alone > 0.3 * spread
    assert together < 0.2 * spread, (alone, together, spread)

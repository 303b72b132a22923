"""OT-CFM, the peer that trajectory benchmarks know best, in a few lines of our own (Tong et al., TMLR 2024).

Between consecutive observed times a < b, minibatches are paired by exact optimal transport; with x_a, x_b of a pair and
u uniform in (0, 1),

    x = (1 - u) x_a + u x_b + sigma e,    time = a + u (b - a),    target = (x_b - x_a) / (b - a)

and a network learns the velocity at (x, time). Cells of the last observed time are then carried to the missing one.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bgen.flow.displacement import pair

SIGMA = 0.1
WIDTH = 64
STEPS = 2000
BATCH = 128
SOLVER_STEPS = 100


def ot_cfm(
    populations: dict[float, NDArray[np.float32]], time: float, n: int, seed: int, steps: int = STEPS
) -> NDArray[np.float32]:
    """Return n cells ``[n, D]`` at a missing time, from the populations ``[N, D]`` of the observed ones."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 5])
    times = sorted(populations)
    size = populations[times[0]].shape[1]
    layers: list[nn.Module] = [nn.Linear(size + 1, WIDTH), nn.SELU()]
    for _ in range(2):
        layers += [nn.Linear(WIDTH, WIDTH), nn.SELU()]
    network = nn.Sequential(*layers, nn.Linear(WIDTH, size))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        inputs, targets = [], []
        for a, b in pairwise(times):
            x = populations[a][rng.integers(len(populations[a]), size=BATCH)]
            y = populations[b][rng.integers(len(populations[b]), size=BATCH)]
            y = y[pair(x, y)]
            u = rng.random((BATCH, 1))
            place = (1 - u) * x + u * y + SIGMA * rng.standard_normal(x.shape)
            inputs.append(np.concatenate([place, a + u * (b - a)], axis=1))
            targets.append((y - x) / (b - a))
        predicted = network(torch.from_numpy(np.concatenate(inputs)).float())
        loss = (predicted - torch.from_numpy(np.concatenate(targets)).float()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    before = max(t for t in times if t < time)
    start = populations[before]
    cells = torch.from_numpy(np.concatenate([rng.permutation(start) for _ in range(-(-n // len(start)))])[:n]).float()
    step = (time - before) / SOLVER_STEPS
    with torch.no_grad():
        for k in range(SOLVER_STEPS):
            now = torch.full((n, 1), before + k * step)
            cells = cells + step * network(torch.cat([cells, now], dim=1))
    return cells.numpy()

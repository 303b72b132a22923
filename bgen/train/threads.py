"""How many threads of a CPU a training step is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bgen.distributed.world import World, threads_are_ours

WORTH = 72_000_000
"""Trained parameters times cells of a micro batch that pay for a thread.

Measured on two idle cores, one thread's time over two threads': 0.97 at 51 million (VAE, 256 cells x 500 genes), 1.06
at 125 (flow of the demo, 256 cells), 1.25 at 150 (VAE, 256 x 2,000), 1.42 at 205 (1,024 x 500), 1.65 at 601
(1,024 x 2,000), 1.08 at 1,225 (hybrid over trajectories, 128 cells). Beside a program that keeps one of the cores busy,
each thread more is one more that the others wait for.
"""


def paid_for(parameters: int, cells: int, most: int) -> int:
    """Return how many of at most ``most`` threads a step pays for, at least 1."""
    return max(1, min(most, parameters * cells // WORTH))


@contextmanager
def as_many_threads_as_pay(module: nn.Module, cells: int, world: World) -> Iterator[None]:
    """Let torch take no more threads than a step pays for, unless the user said how many to take.

    The number depends on the module, the micro batch and the machine alone, so that a run that is resumed takes as many
    again: sums of floats depend on it.

    Parameters
    ----------
    module
        What is trained.
    cells
        Of a micro batch.
    world
        This rank's place; on a GPU nothing changes.
    """
    before = torch.get_num_threads()
    if world.device.type == "cpu" and threads_are_ours(world):
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        torch.set_num_threads(paid_for(trained, cells, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)

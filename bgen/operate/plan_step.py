"""How long a training step takes on GPUs: what is computed, and what the ranks tell each other.

With P bytes of trained weights, in float32, on R ranks, DeepSpeed 0.19 moves in a step (of gradients that travel in
bfloat16, half)

- stage 0: gradients, all-reduced, 2 P (R - 1) / R out of every rank;
- stage 1: the same (it all-reduces there, too), and the new weights, gathered, P (R - 1) / R;
- stage 2: the same, but gradients in every micro batch;
- stage 3: in every micro batch the weights, gathered, and the gradients, scattered, each P (R - 1) / R. Weights that
  are needed again within 1e9 elements, on the way back those of the last 5e8, are gathered once; others twice.

tests/multiprocess/test_told.py holds this against what two ranks tell each other.

One rank sends over the links of its host; of what leaves a host, each rank's network card takes its part. Nothing of it
is done beside computing. Both are taken at :data:`REACHED` of what the data sheet says.

Computing takes at least :data:`LAUNCH` for each kernel (:mod:`bgen.operate.plan_kernels`), which Python and the driver
need to start it: this binds steps of few cells.

What is not counted: the latency of hundreds of ranks, and data that come too slowly. No figure was held against a
cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bgen.track.devices import Device

REACHED = 0.8
"""Share of the bandwidth that collectives reach."""

LAUNCH = 7e-6
"""Seconds from one kernel to the next, if they are small: of Python, torch and the driver."""

NODES = (1, 2, 4, 8, 16, 32, 64)
"""Hosts of the curve of weak scaling."""

KEPT = 500_000_000
"""Elements of the last layers that DeepSpeed's stage 3 keeps from the forward pass for the backward pass."""

READ_BYTES = 0.85
"""Bytes of the store (profile small) for each expressed gene of a cell: 1,341 a cell of 1,600 genes were measured."""


@dataclass(frozen=True)
class Cluster:
    """Ranks, and what lies between them.

    Attributes
    ----------
    nodes, ranks_per_node
        Hosts, and GPUs of each.
    device
        The GPUs.
    network
        Bytes/s in one direction of a rank's network card.
    """

    nodes: int
    ranks_per_node: int
    device: Device
    network: float

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.nodes * self.ranks_per_node

    @property
    def bandwidth(self) -> float:
        """Bytes/s of what goes round all ranks: what one rank's link carries, or all cards of a host together."""
        between = self.network * self.ranks_per_node if self.nodes > 1 else float("inf")
        return REACHED * min(self.device.link, between)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes
    ----------
    compute
        Forward and backward pass, of all micro batches.
    reduce, gather
        Gradients, and weights, from rank to rank.
    cells
        Of the step, over all ranks.
    """

    compute: float
    reduce: float
    gather: float
    cells: int

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.reduce + self.gather

    @property
    def cells_per_s(self) -> float:
        """Over all ranks."""
        return self.cells / self.seconds


@dataclass(frozen=True)
class Work:
    """What a step asks for.

    Attributes
    ----------
    trained
        Bytes of the trained weights, and of their gradients.
    flops_per_cell
        Forward and backward pass.
    cells
        Of one rank.
    accumulation
        Micro batches of one rank.
    zero
        ZeRO stage.
    flops_per_s
        What a GPU reaches.
    launches
        Kernels of a micro batch.
    sent
        Bytes of a gradient as it travels, over those of its weight.
    elements
        Trained weights.
    """

    trained: int
    flops_per_cell: int
    cells: int
    accumulation: int
    zero: int
    flops_per_s: float
    launches: int = 0
    sent: float = 1.0
    elements: int = 0

    @property
    def gathers(self) -> float:
        """How often stage 3 gathers the weights for a micro batch."""
        return 1.0 if self.elements <= KEPT else 2 - KEPT / self.elements


def step_time(work: Work, cluster: Cluster) -> StepTime:
    """Return how long a step takes."""
    share = work.trained * (cluster.ranks - 1) / cluster.ranks / cluster.bandwidth
    if work.zero == 3:
        reduce, gather = work.accumulation * work.sent * share, work.gathers * work.accumulation * share
    else:
        times = work.accumulation if work.zero == 2 else 1
        reduce, gather = 2 * times * work.sent * share, share if work.zero else 0.0
    compute = max(work.cells * work.flops_per_cell / work.flops_per_s, work.accumulation * work.launches * LAUNCH)
    return StepTime(compute, reduce, gather, work.cells * cluster.ranks)


def weak_scaling(work: Work, cluster: Cluster) -> list[tuple[int, float, float]]:
    """Return hosts, cells/s and the share of the first host's speed that each further one gives; cells a rank stay."""
    found = [(n, step_time(work, replace(cluster, nodes=n)).cells_per_s) for n in NODES]
    return [(n, rate, rate / n / found[0][1]) for n, rate in found]


def balanced_cells(work: Work, cluster: Cluster) -> int:
    """Return the cells a rank from which computing takes longer than what the ranks tell each other, and launches."""
    time = step_time(work, cluster)
    least = max(time.reduce + time.gather, work.launches * LAUNCH)
    return max(1, round(least * work.flops_per_s / work.flops_per_cell))


def advice(work: Work, cluster: Cluster, fits: Sequence[int]) -> list[str]:
    """Return what would make the step better; ``fits`` are the ZeRO stages whose memory a rank has."""
    said = []
    time = step_time(work, cluster)
    talk, cells = time.reduce + time.gather, balanced_cells(work, cluster)
    if cells > work.cells:
        idle = talk > work.launches * LAUNCH
        said.append(
            (f"The ranks talk {talk / time.seconds:.0%} of the time." if idle else "Kernels are too small for the GPU.")
            + f" From {cells:,} cells a rank on (train.global_batch={cells * cluster.ranks}) computing takes longest"
            + ("; or take fewer nodes." if idle else ".")
        )
    others = [zero for zero in fits if zero < work.zero]
    if others and cluster.ranks > 1:
        best = min(others, key=lambda zero: step_time(replace(work, zero=zero), cluster).seconds)
        quicker = time.seconds / step_time(replace(work, zero=best), cluster).seconds
        if quicker > 1.02:
            said.append(f"train.zero={best} fits as well, and a step is {quicker:.2g} times as fast.")
    return said

"""How much memory a rank of a run will need, by ZeRO stage and offload.

With P bytes of trained weights and R ranks, a rank's share is P/R. What DeepSpeed 0.19 keeps, and what it needs for a
moment:

- stage 0: weights P, Adam's two moments 2 P; for a moment gradients P and a bucket of at most :data:`BUCKET` elements.
- stage 1, 2: weights P, and a share of float32 weights and moments, 3 P/R; for a moment, in the backward pass,
  gradients P and a bucket, or, in the step, 4 P/R: the share's gradients twice and two temporaries of Adam. (Stage 2
  drops the gradients of other shares at once, which shows only between two passes.)
- stage 3: only shares, of weights, float32 weights, moments and gradients, 5 P/R, and a bucket; for a moment the
  gathered weights and gradients, 2 P + P/R.

The formulas were fitted to measured runs; tests/operate/test_plan.py compares them with runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from bgen.config.train import TrainConfig
from bgen.train.engine.deepspeed_json import BUCKET

PROCESS = 700_000_000
"""Bytes of a process that has imported and opened everything but holds no model."""

PROCESS_WITH_GPU = 4_000_000_000
"""The same with CUDA's libraries and context, pinned batches and NCCL's buffers: a guess on the safe side."""

HOST = 16_000_000_000
"""Bytes of a host beside its ranks: chunks that are read and decoded, what the file system holds, shared memory."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes
    ----------
    zero
        ZeRO stage.
    offload
        Whether the optimiser's state is offloaded to the host, and at stage 3 the parameters too.
    weights, optimizer
        What stays: weights and gradients, moments and float32 weights. Offloaded parts are in ``host``.
    working
        Largest temporary need of the backward pass and the step, activations included.
    host
        On the host: offloaded parts, and the copy from which a checkpoint is written.
    """

    zero: int
    offload: bool
    weights: int
    optimizer: int
    working: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the accelerator, at the peak."""
        return self.weights + self.optimizer + self.working

    @property
    def resident(self) -> int:
        """Bytes of the process where the host computes too."""
        return PROCESS + self.device + self.host


def memory(
    config: TrainConfig,
    *,
    trained: int,
    frozen: int,
    largest: int,
    activations: int,
    ranks: int,
    zero: int,
    offload: bool,
) -> Memory:
    """Return the memory of a rank.

    Parameters
    ----------
    config
        Settings; its ZeRO stage and offload are not used.
    trained, frozen, largest
        Numbers of parameters: trained, frozen, and of the largest tensor.
    activations
        Bytes of a micro batch's forward and backward pass beside weights and gradients.
    ranks
        R.
    zero, offload
        Stage, and whether to offload.
    """
    wide = 4
    narrow = 2 if config.precision == "pure_bf16" else wide
    P, weights = wide * trained, narrow * trained
    share = P // ranks if zero else P
    bucket = min(wide * BUCKET, P)
    averages = share * ((config.ema > 0) + (config.patience > 0))
    fixed = narrow * frozen
    accumulated = (
        share if config.cells_at_a_time is not None and config.cells_at_a_time * ranks < config.global_batch else 0
    )
    if zero == 0:
        kept, optimizer = weights + fixed, 2 * P + (P if narrow < wide else 0)
        working = max(activations + P + bucket, P + 2 * wide * largest)
    elif zero < 3:
        kept, optimizer = weights + fixed, 3 * share
        working = max(activations + P + bucket + accumulated, 4 * share)
    else:
        kept, optimizer = (weights + fixed) // ranks + share + bucket, 3 * share
        working = max(activations + 2 * P + share, 3 * share)
    host = 3 * share + averages  # the copy that a checkpoint is written from
    if offload:
        host, optimizer = host + optimizer, 0
        working = activations + P + bucket if zero < 3 else activations + 2 * P
        if zero == 3:
            moved = (weights + fixed) // ranks
            host, kept = host + moved, kept - moved
    return Memory(zero, offload, kept, optimizer + averages, working, host)


def host_bytes(needed: Memory, frozen: int, trained: int, ranks_per_node: int, *, gpu: bool) -> int:
    """Return the bytes of memory that a host should have for its ranks.

    A rank on a GPU builds the model in the host's memory, and holds the frozen part twice while it reads it; later it
    holds there what is offloaded and the copy that a checkpoint is written from.

    Parameters
    ----------
    needed
        Memory of one rank.
    frozen, trained
        Numbers of parameters.
    ranks_per_node
        Ranks of a host.
    gpu
        Whether a rank computes on a GPU.
    """
    built = 4 * (trained + 2 * frozen)
    each = PROCESS_WITH_GPU + max(built, needed.host) if gpu else needed.resident
    return HOST + ranks_per_node * each

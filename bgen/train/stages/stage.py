"""What the trainer needs to know of a training stage (VAE, flow): a module, its batches, and what to do at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from bgen.config.run import RunConfig
from bgen.data.batch import CellBatch
from bgen.data.packed import PackedBatch


@runtime_checkable
class CountsFlops(Protocol):
    """A module that knows how much it computes."""

    def training_flops(self, batch: CellBatch) -> int:
        """Return the floating-point operations of both passes over a batch; recomputation does not count."""
        ...


@runtime_checkable
class ChecksBatches(Protocol):
    """A module that must look at the values of a batch before it computes with them."""

    def check_batch(self, batch: CellBatch) -> None:
        """Raise UserError if the module cannot take a batch, which is still on the CPU: a GPU's answer takes a wait."""
        ...


@runtime_checkable
class CountsDamage(Protocol):
    """A stage that may go on without data that is damaged."""

    def damage(self) -> dict[int, str]:
        """Return the damaged chunks that this rank has met so far, and what is wrong with each."""
        ...

    def damaged_cells(self) -> int:
        """Return how many cells of this rank's batches were replaced by others so far."""
        ...


@runtime_checkable
class SplitsBatches(Protocol):
    """A stage whose micro batches may be of another size than it was made with.

    Attributes
    ----------
    unit
        Cells that stay together: those of a trajectory, else 1.
    """

    @property
    def unit(self) -> int:
        """See above."""
        ...

    def split(self, config: RunConfig) -> None:
        """Take the same settings with another ``train.micro_batch``, a multiple of ``unit`` that divides the share."""
        ...


class Stage(Protocol):
    """One stage of training.

    Attributes
    ----------
    module
        ``forward(batch)`` returns per-cell losses ``{name: [B]}``, the same names at every call; the mean of ``"loss"``
        over the global batch is minimised, the others are recorded.
    monitor
        Name of the held-out loss that early stopping watches.
    fingerprint
        JSON values that must be the same when a run is resumed, such as the store's fingerprint and the hash of the
        gene vocabulary.
    """

    module: nn.Module
    monitor: str
    fingerprint: dict[str, Any]

    def train_batches(self, start_step: int) -> Iterator[Sequence[CellBatch | PackedBatch]]:
        """Yield this rank's micro batches on the CPU, step by step from ``start_step`` on, without end.

        Packed batches are unpacked where they are needed. Every rank yields as many batches, all of the same size; the
        cells are a pure function of the step.
        """
        ...

    def valid_batches(self) -> Iterator[tuple[CellBatch, Tensor]]:
        """Yield this rank's share of the held-out cells, with a float32 weight ``[B]`` (0 for padding).

        Every rank yields as many batches.
        """
        ...

    def finish(self, module: nn.Module) -> None:
        """Called once on every rank after training, with the weights to be exported loaded into ``module``."""
        ...

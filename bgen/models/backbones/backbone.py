"""The base of all velocity networks.

Axes: B trajectories, T time points, N cells per time point, D latent size, O output size, C width of the condition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """``[B, T, N, D]`` to ``[B, T, N, O]``.

    Attributes
    ----------
    head
        The last layer, to O.
    """

    head: nn.Module

    @abstractmethod
    def forward(
        self,
        z: Tensor,
        t: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """Apply the network.

        Parameters
        ----------
        z
            ``[B, T, N, D]``: noisy latents.
        t
            ``[B, T]``: flow times, each time point its own.
        condition
            ``[B, T, C]``: embedded conditions.
        mask
            bool ``[B, T, N]``: cells that exist; a time point without one was not observed. None: all.
        time
            ``[B, T]``: when the time points are, in the store's unit, ascending. None: ``time.scale`` apart.

        Returns
        -------
        ``[B, T, N, O]``
        """

    def check_times(self, mask: Tensor | None, time: Tensor) -> None:
        """Raise UserError if the times ``[B, T]`` do not suit what mixes along them.

        :meth:`forward` does so where they are on the CPU. On a GPU the host would have to wait for the answer: whoever
        moves them there asks before.
        """

    @abstractmethod
    def flops(self, B: int, T: int, N: int) -> int:
        """Floating-point operations of the forward pass; see :mod:`bgen.nn.flops` for what is counted."""

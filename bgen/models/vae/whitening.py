"""Mean and standard deviation of the latents and the log library over the training cells, gathered batch by batch.

Axes: B cells, D latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class WhiteningStats:
    """Running sums over cells, kept as plain float64 tensors that ranks can reduce.

    ``sums`` (number of cells, then sums, then sums of squares) is reduced with SUM; ``bounds`` (minus the smallest log
    library, the largest) with MAX.

    Parameters
    ----------
    latent
        D.
    device
        Where the sums live; collectives may need a GPU.
    """

    def __init__(self, latent: int, device: torch.device | str = "cpu") -> None:
        self.size = latent + 1
        self.sums = torch.zeros(1 + 2 * self.size, dtype=torch.float64, device=device)
        self.bounds = torch.full((2,), -torch.inf, dtype=torch.float64, device=device)

    def add(self, z: Tensor, log_library: Tensor) -> None:
        """Add a batch: posterior samples ``z [B, D]`` and log total counts ``[B]``."""
        x = torch.cat((z, log_library[:, None]), dim=1).to(self.sums)
        of_states = torch.cat((self.sums.new_tensor([len(x)]), x.sum(dim=0), x.square().sum(dim=0)))
        self.sums[: len(of_states)] += of_states
        if len(x):
            low, high = torch.aminmax(x[:, -1])
            self.bounds = torch.maximum(self.bounds, torch.stack((-low, high)))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance ``[D + 1]``, float64."""
        n, total, squares = self.sums[0], self.sums[1 : 1 + self.size], self.sums[1 + self.size : 1 + 2 * self.size]
        assert n > 0, "no cells were added"
        mean = total / n
        return mean, (squares / n - mean.square()).clamp_min(0)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean ``[D + 1]``, standard deviation ``[D + 1]`` and range of the log library ``[2]``, float32.

        A dimension that does not vary gets standard deviation 1.
        """
        mean, variance = self.moments()
        std = variance.sqrt()
        std = torch.where(std > 1e-6, std, 1.0)
        return mean.float(), std.float(), torch.stack((-self.bounds[0], self.bounds[1])).float()

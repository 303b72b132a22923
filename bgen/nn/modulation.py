"""AdaLN-zero: a block's normalisation, shifted and scaled by a conditioning vector, with a gate that starts at zero.

    y = LayerNorm(x) * (1 + scale(c)) + shift(c),    x <- x + gate(c) * block(y)

(Peebles and Xie, "Scalable diffusion models with transformers", 2023; the shift and scale are FiLM, Perez et al. 2018).
The three maps start at zero: every block begins as the identity, and the condition enters as soon as it helps.

Axes: B trajectories, T time points, N cells per time point, D width of the block, C width of the condition.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bgen.nn.flops import layers


class AdaLNZero(nn.Module):
    """Modulated normalisation in front of a residual branch, and the gate behind it.

    The condition has one vector per time point, ``[B, T, C]`` (flow time, which may differ per time point, plus the
    embedded conditions); all N cells of a time point share it. A block of any mixer uses it so::

        y, gate = self.modulation(x, condition)  # x, y [B, T, N, D]; gate [B, T, 1, D]
        x = x + gate * self.mixer(y)

    Other shapes work as long as the condition broadcasts: axes that it lacks before its last one are filled with ones.
    So ``x [B, T, D]`` with ``condition [B, T, C]`` or ``x [B, D]`` with ``[B, C]`` work as well.

    Parameters
    ----------
    width
        D.
    condition
        C.
    """

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.project = nn.Linear(condition, 3 * width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return the modulated, normalised ``x`` (its shape) and the gate, which broadcasts to it."""
        parameters = self.project(F.silu(condition))
        missing = x.dim() - parameters.dim()
        parameters = parameters.view(*parameters.shape[:-1], *([1] * missing), parameters.shape[-1])
        shift, scale, gate = parameters.chunk(3, dim=-1)
        return self.norm(x) * (1 + scale) + shift, gate

    def flops(self, conditions: int) -> int:
        """Floating-point operations of the forward pass for so many vectors of conditions."""
        return layers(conditions, self.project)

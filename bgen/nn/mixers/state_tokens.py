"""State tokens: mix populations over time without pairing cell i of one time point with cell i of the next.

    s_t = learned queries attending to the cells of time point t        [M tokens]
    r   = time mixer over s, each token a sequence over T
    y_i = cell i of time point t attending to r_t

Sequencing destroys cells, so they are exchangeable within each time point by itself. Permuting the cells of one time
point permutes its result and changes nothing else.

Axes: B trajectories, T time points, N cells per time point, D width, M tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from bgen.config.backbone import AttentionConfig
from bgen.nn.mixers.attention import Attention
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.mixers.set_transformer import AttentionPool
from bgen.nn.points import Points


class StateTokens(nn.Module):
    """Mix ``[B, T, N, D]`` along T through M tokens per time point.

    Parameters
    ----------
    width
        D.
    tokens
        M.
    mixer
        Mixes ``[B M, T, D]`` along T.
    config
        Settings of the attention that pools and of the attention that reads back.
    """

    def __init__(self, width: int, tokens: int, mixer: Mixer, config: AttentionConfig) -> None:
        super().__init__()
        self.pool = AttentionPool(width, tokens, config)
        self.norm = nn.LayerNorm(width)
        self.mixer = mixer
        self.read_norm = nn.LayerNorm(width)
        self.read = Attention(width, config)

    def forward(self, x_BTND: Tensor, mask_BTN: Tensor | None, points: Points) -> Tensor:
        """Mix.

        Parameters
        ----------
        x_BTND
            Cells; those that do not exist are zero.
        mask_BTN
            Cells that exist. None: all.
        points
            The time points, ``[B, T]``; one without a cell is not valid.

        Returns
        -------
        ``[B, T, N, D]``; what it holds at cells that do not exist has no meaning.
        """
        B, T, N, D = x_BTND.shape
        cells = x_BTND.reshape(B * T, N, D)
        token_BTMD = self.pool(cells, None if mask_BTN is None else mask_BTN.reshape(B * T, N)).view(B, T, -1, D)
        M = token_BTMD.shape[2]
        line = self.norm(token_BTMD).transpose(1, 2).reshape(B * M, T, D)
        mixed = self.mixer(line, points.repeated(M)).view(B, M, T, D).transpose(1, 2).reshape(B * T, M, D)
        return self.read(cells, self.read_norm(mixed)).view(B, T, N, D)

    def flops(self, B: int, T: int, N: int) -> int:
        """Floating-point operations of the forward pass; see :mod:`bgen.nn.flops` for what is counted."""
        M = len(self.pool.seed_embedding)
        return self.pool.flops(B * T, N) + self.mixer.flops(B * M, T) + self.read.flops(B * T, N, M)

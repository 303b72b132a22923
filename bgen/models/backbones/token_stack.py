"""The velocity network that sees a cell's latent state as tokens, and mixes along them like along time and cells.

A DiT (Peebles and Xie, 2023) over the tokens of a latent, as scLDM's (arXiv 2511.02986), is the pattern "tokens, none";
with "time" and "cells" in the pattern each token is mixed over those axes, too. The library size is a token of its own.

Axes: B trajectories, T time points, N cells per time point, K tokens of the latent state, P dimensions of a token, O
outputs for each latent dimension, C width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from bgen.config.backbone import BackboneConfig
from bgen.errors import UserError
from bgen.models.backbones.backbone import Backbone
from bgen.models.backbones.block import Block
from bgen.models.backbones.grid import Grid
from bgen.models.backbones.stack import check_times, through
from bgen.nn.embedding import TimeEmbedding
from bgen.nn.flops import layers


class TokenHead(nn.Module):
    """Tokens ``[..., K + 1, C]`` to ``[..., O (K P + 1)]``, each by itself. It is zero at the start."""

    def __init__(self, width: int, dimensions: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.state = nn.Linear(width, outputs * dimensions)
        self.library = nn.Linear(width, outputs)
        for layer in (self.state, self.library):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Read the latent dimensions off their tokens."""
        state = self.state(x[..., :-1, :]).unflatten(-1, (self.outputs, -1)).transpose(-2, -3).flatten(-2)
        return torch.cat([state, self.library(x[..., -1, :])[..., None]], -1).flatten(-2)


class TokenStack(Backbone):
    """``[B, T, N, K P + 1]`` to ``[B, T, N, O (K P + 1)]``, by blocks along the axes of the pattern.

    Parameters
    ----------
    size
        K P + 1: the library size is the last.
    config
        Everything else; ``width`` is C, that of each token.
    outputs
        O (K P + 1).

    Raises
    ------
    UserError
        If the latent state cannot be split into so many tokens.
    """

    head: TokenHead
    decayed = ()

    def __init__(self, size: int, config: BackboneConfig, outputs: int) -> None:
        super().__init__()
        self.config, self.tokens = config, config.tokens.count
        if (size - 1) % self.tokens:
            raise UserError(
                f"flow.backbone.tokens.count: a latent state of {size - 1} dimensions cannot be split into"
                f" {self.tokens} tokens of one size. Choose a divisor of {size - 1}."
            )
        dimensions = (size - 1) // self.tokens
        self.flow_time = TimeEmbedding(config.width)
        self.stem = nn.Linear(dimensions, config.width)
        self.library_stem = nn.Linear(1, config.width)
        self.identity = nn.Parameter(torch.randn(self.tokens + 1, config.width))
        self.blocks = nn.ModuleList(Block(axis, config) for _ in range(config.layers) for axis in config.axes)
        self.norm = nn.LayerNorm(config.width)
        self.head = TokenHead(config.width, dimensions, outputs // size)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """See :class:`Backbone`; the result is zero at cells that do not exist."""
        B, T, N, _ = z.shape
        if time is not None and time.device.type == "cpu":
            self.check_times(mask, time)
        scaled = None if time is None else time / self.config.time.scale
        whole = Grid((B, T, N), mask, scaled)
        each = self.tokens + 1
        grid = Grid((B * each, T, N), *(None if of is None else of.repeat_interleave(each, 0) for of in (mask, scaled)))
        z = whole.blank(z)
        state = self.stem(z[..., :-1].unflatten(-1, (self.tokens, -1)))
        library = self.library_stem(z[..., -1:])[..., None, :]
        x = torch.cat([state, library], -2) + self.identity  # [B, T, N, K + 1, C]
        x = x.permute(0, 3, 1, 2, 4).flatten(0, 1)
        condition = (condition + self.flow_time(t)).repeat_interleave(each, 0)
        x = self.norm(through(self.blocks, x, condition, grid, self.config.recompute))
        return whole.blank(self.head(x.unflatten(0, (B, each)).permute(0, 2, 3, 1, 4)))

    def check_times(self, mask: Tensor | None, time: Tensor) -> None:
        """See :class:`Backbone`."""
        check_times(self, self.config, mask, time)

    def flops(self, B: int, T: int, N: int) -> int:
        """See :class:`Backbone`."""
        cells, each = B * T * N, self.tokens + 1
        blocks = sum(block.flops(B * each, T, N) for block in cast("Iterable[Block]", self.blocks))
        of_state = layers(cells * self.tokens, self.stem, self.head.state)
        of_library = layers(cells, self.library_stem, self.head.library)
        return of_state + of_library + self.flow_time.flops(B * T) + blocks

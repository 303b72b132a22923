"""The backbones by name."""

from __future__ import annotations

from collections.abc import Callable

from bgen.config.backbone import BackboneConfig
from bgen.models.backbones.backbone import Backbone
from bgen.models.backbones.mlp import MLPBackbone
from bgen.models.backbones.stack import Stack
from bgen.models.backbones.token_stack import TokenStack

BACKBONES: dict[str, Callable[[int, BackboneConfig, int], Backbone]] = {
    "mlp": lambda size, config, outputs: MLPBackbone(size, config.width, config.layers, outputs),
    "transformer": Stack,
    "set_transformer": Stack,
    "ssm": Stack,
    "hybrid": lambda size, config, outputs: _hybrid(config)(size, config, outputs),
}


def _hybrid(config: BackboneConfig) -> type[Stack | TokenStack]:
    return TokenStack if "tokens" in config.axes else Stack


def build_backbone(size: int, config: BackboneConfig, outputs: int | None = None) -> Backbone:
    """Make the velocity network that ``config`` names.

    Parameters
    ----------
    size
        Latent size D, with the library size counted in.
    config
        Kind and sizes; ``width`` is also the width C of the embedded conditions.
    outputs
        Size O of what it returns; None: D.
    """
    return BACKBONES[config.name](size, config, size if outputs is None else outputs)

"""The mixers by name. README.md in this folder says how to add one."""

from __future__ import annotations

from collections.abc import Callable

from bgen.config.backbone import BackboneConfig, HyenaConfig, Mamba1Config, Mamba2Config, S4DConfig
from bgen.nn.mixers.attention import CellAttention, TimeAttention
from bgen.nn.mixers.hyena import Hyena
from bgen.nn.mixers.mamba1 import Mamba1
from bgen.nn.mixers.mamba2 import Mamba2
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.mixers.s4d import S4D
from bgen.nn.mixers.set_transformer import SetAttention

TIME_MIXERS: dict[str, Callable[[BackboneConfig], Mixer]] = {
    "mamba2": lambda config: Mamba2(config.width, config.settings(Mamba2Config), config.time),
    "mamba1": lambda config: Mamba1(config.width, config.settings(Mamba1Config), config.time),
    "s4d": lambda config: S4D(config.width, config.settings(S4DConfig), config.time),
    "hyena": lambda config: Hyena(config.width, config.settings(HyenaConfig), config.time),
    "attention": lambda config: TimeAttention(config.width, config.attention, config.time),
}
"""Mixers of time points; their settings are in :data:`bgen.config.backbone.TIME_MIXERS`."""

CELL_MIXERS: dict[str, Callable[[BackboneConfig], Mixer]] = {
    "attention": lambda config: CellAttention(config.width, config.attention),
    "set_attention": lambda config: SetAttention(config.width, config.cells.inducing, config.attention),
}
"""Mixers of the cells of a population, which have no order; settings in :data:`bgen.config.backbone.CELL_MIXERS`."""

"""Settings of the backbones: which mixers stand along which axis, and their sizes (bgen/README.md, "Backbones").

A mixer's own settings are a section here and one line in :data:`TIME_MIXERS` or :data:`CELL_MIXERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bgen.config.components import NameIn, SectionOfComponents
from bgen.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section

BackboneName = Literal["mlp", "transformer", "set_transformer", "ssm", "hybrid"]
Axis = Literal["none", "cells", "time", "tokens"]

PATTERNS: dict[str, tuple[Axis, ...]] = {
    "transformer": ("cells", "none"),
    "set_transformer": ("cells", "none"),
    "ssm": ("time", "none"),
    "hybrid": ("time", "cells", "none"),
}
"""Axes along which the blocks of one layer mix, in order."""


class MixerConfig(Section):
    """Settings of one mixer."""

    def misfits(self, width: int, *, real_time: bool) -> list[str]:
        """Return the settings that do not fit a backbone of that width, over real time or a grid, as ``key: why``."""
        return []


class MLPConfig(Section):
    """The mixer along no axis: each cell by itself."""

    expand: PositiveInt = Field(4, description="Hidden width over width.")


class AttentionConfig(MixerConfig):
    """Softmax attention, over cells, over time, and between cells and tokens."""

    heads: PositiveInt = Field(4, description="Heads, H; the width must be a multiple of 2 H.")
    qk_norm: bool = Field(True, description="Normalise queries and keys, which bounds the logits.")
    shortest_period: PositiveFloat = Field(
        1.0, description="Shortest period of the rotary angles over time, in units of time.scale."
    )
    longest_period: PositiveFloat = Field(1000.0, description="Longest period, in the same unit.")


class Mamba2Config(MixerConfig):
    """Mamba-2 (SSD)."""

    expand: PositiveInt = Field(2, description="Inner width over width.")
    head_width: PositiveInt = Field(64, description="Channels per head; must divide the inner width.")
    state: PositiveInt = Field(64, description="Size of the state per channel.")
    groups: PositiveInt = Field(1, description="Groups of heads that share the maps into and out of the state.")
    rate: Literal["selective", "fixed"] = Field(
        "selective", description="Rate of decay: depends on the input, or one learned constant per head."
    )
    convolution: PositiveInt = Field(4, description="Width of the short convolution; unused with real_time.")
    backend: Literal["auto", "torch", "fused"] = Field(
        "auto", description="auto: mamba-ssm's kernels on CUDA, torch elsewhere; torch: also on CUDA, slow."
    )

    def misfits(self, width: int, *, real_time: bool) -> list[str]:
        """See :class:`MixerConfig`: heads must divide the inner width, and groups the heads."""
        inner = self.expand * width
        if inner % self.head_width:
            return [
                f"mamba2.head_width: {self.head_width} does not divide the inner width {inner} (mamba2.expand x width)"
            ]
        heads = inner // self.head_width
        return [f"mamba2.groups: {self.groups} does not divide the {heads} heads"] if heads % self.groups else []


class Mamba1Config(MixerConfig):
    """Mamba (selective scan)."""

    expand: PositiveInt = Field(2, description="Inner width over width.")
    state: PositiveInt = Field(16, description="Size of the state per channel.")
    rank: PositiveInt | None = Field(None, description="Rank of the map to the rates; default: width / 16, rounded up.")
    convolution: PositiveInt = Field(4, description="Width of the short convolution; unused with real_time.")
    backend: Literal["auto", "torch", "fused"] = Field(
        "auto", description="auto: mamba-ssm's compiled kernel on CUDA, torch elsewhere; torch: also on CUDA, slow."
    )


class S4DConfig(MixerConfig):
    """Diagonal structured state space."""

    state: Annotated[int, Field(gt=0, multiple_of=2)] = Field(
        16, description="State size per channel; conjugate pairs, so even. Memory grows with it in recurrent form."
    )
    form: Literal["recurrent", "convolutional"] = Field(
        "recurrent", description="recurrent: any times; convolutional (FFT): a regular grid only."
    )

    def misfits(self, width: int, *, real_time: bool) -> list[str]:
        """See :class:`MixerConfig`: the convolutional form knows no unequal gaps."""
        if self.form == "recurrent" or not real_time:
            return []
        return ["time.real_time: s4d.form convolutional needs a regular grid; set it to false or use recurrent"]


class HyenaConfig(MixerConfig):
    """Hyena: gated long convolutions with filters from a small network. A regular grid only."""

    order: Annotated[int, Field(ge=2)] = Field(2, description="Number of gates.")
    max_length: PositiveInt = Field(2048, description="Time points at most; the filters are defined on this many.")
    filter_width: PositiveInt = Field(64, description="Width of the network that makes the filters.")
    bands: PositiveInt = Field(2, description="Frequencies that describe a place to that network.")
    shift: NonNegativeFloat = Field(0.05, description="Added to the filters' window: 0.05 as HyenaDNA, 0 as safari.")

    def misfits(self, width: int, *, real_time: bool) -> list[str]:
        """See :class:`MixerConfig`: filters belong to places of a grid."""
        return ["time.real_time: hyena needs a regular grid; set it to false"] if real_time else []


TIME_MIXERS: dict[str, type[MixerConfig]] = {
    "mamba2": Mamba2Config,
    "mamba1": Mamba1Config,
    "s4d": S4DConfig,
    "hyena": HyenaConfig,
    "attention": AttentionConfig,
}
"""Mixers over time to their settings; the mixers themselves are in :mod:`bgen.nn.mixers.registry`."""

CELL_MIXERS: dict[str, type[MixerConfig]] = {
    "attention": AttentionConfig,
    "set_attention": AttentionConfig,
}
"""Mixers over cells, likewise."""


class TimeConfig(Section):
    """Mixing over time points, whatever the mixer."""

    mixer: Annotated[str, NameIn(TIME_MIXERS)] = Field("mamba2", description="What mixes along time.")
    direction: Literal["causal", "bidirectional"] = Field(
        "bidirectional", description="causal: a time point sees only itself and the past."
    )
    real_time: bool = Field(
        True, description="Step sizes and angles come from real time gaps; false: from places in a regular grid."
    )
    scale: PositiveFloat = Field(
        1.0, description="Time, in the store's unit, that counts as 1: a typical gap, or the spacing of a regular grid."
    )
    tracked: bool = Field(
        False,
        description="true: slot i is the same cell (or bulk sample) at every time point, and each slot is mixed over "
        "time; false: populations, summarised by state tokens.",
    )
    tokens: PositiveInt = Field(8, description="State tokens, M, that summarise one population.")


class CellsConfig(Section):
    """Mixing over the cells of one time point."""

    mixer: Annotated[str, NameIn(CELL_MIXERS)] = Field(
        "attention", description="attention: N^2; set_attention: N times inducing points."
    )
    inducing: PositiveInt = Field(32, description="Inducing points of set_attention.")


class TokensConfig(Section):
    """Mixing over the tokens of a cell's latent state, where the pattern names that axis."""

    count: PositiveInt = Field(
        8, description="Tokens, K, that the latent state is split into; the library size is one more."
    )


class BackboneConfig(SectionOfComponents):
    """A velocity network on ``[B, T, N, D]``: layers of residual blocks, each mixing along one axis.

    Beside its own keys it has a section for each mixer, under the mixer's name.
    """

    name: BackboneName = Field("mlp", description="Kind of the network.")
    width: PositiveInt = Field(256, description="Width of the residual stream.")
    layers: PositiveInt = Field(4, description="How often the pattern is repeated.")
    pattern: list[Axis] | None = Field(
        None,
        description="hybrid only: axes of one layer's blocks (time, cells, tokens, none), in order; default time, "
        "cells, none.",
    )
    transfer_from: PositiveInt | None = Field(
        None,
        description="Width at which the learning rate was found; starts and rates then follow muP. Heads keep their "
        "width: attention.heads must grow as width does. null: the same learning rate for everything.",
    )
    recompute: bool = Field(False, description="Activation checkpointing: recompute each block in the backward pass.")
    time: TimeConfig = TimeConfig()
    cells: CellsConfig = CellsConfig()
    tokens: TokensConfig = TokensConfig()
    mlp: MLPConfig = MLPConfig()
    attention: AttentionConfig = AttentionConfig()

    @classmethod
    def component_sections(cls) -> Mapping[str, type[MixerConfig]]:
        """Return the sections of the mixers; attention, which also pools into state tokens, has its own field."""
        mixers = TIME_MIXERS | CELL_MIXERS
        return {name: kind for name, kind in mixers.items() if kind is not AttentionConfig}

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Axes of one layer's blocks."""
        return tuple(self.pattern) if self.pattern is not None else PATTERNS.get(self.name, ("none",))

    def narrowed(self) -> BackboneConfig:
        """Return the settings at the width that the learning rate is transferred from."""
        assert self.transfer_from is not None
        attention = self.attention.model_dump() | {"heads": self.attention.heads * self.transfer_from // self.width}
        return BackboneConfig.model_validate(
            self.model_dump() | {"width": self.transfer_from, "attention": attention, "transfer_from": None}
        )

    @model_validator(mode="after")
    def _fits_together(self) -> BackboneConfig:
        wrong = []
        if self.pattern is not None and self.name != "hybrid":
            wrong.append(f"pattern: only backbone hybrid takes one, not {self.name}")
        if self.pattern == []:
            wrong.append("pattern: name at least one axis")
        if self.name == "transformer" and self.cells.mixer != "attention":
            wrong.append("cells.mixer: transformer has attention; name the backbone set_transformer or hybrid")
        over_time = self.time.mixer if "time" in self.axes else None
        attends = (
            "cells" in self.axes
            or "tokens" in self.axes
            or over_time == "attention"
            or (over_time and not self.time.tracked)
        )
        if attends and self.width % (2 * self.attention.heads):
            wrong.append(f"width: {self.width} is not a multiple of 2 x attention.heads = {2 * self.attention.heads}")
        used = {over_time, self.cells.mixer if "cells" in self.axes else None}
        for name, kind in self.component_sections().items():
            if name in used:
                wrong += self.settings(kind).misfits(self.width, real_time=self.time.real_time)
        if self.attention.longest_period <= self.attention.shortest_period:
            wrong.append("attention.longest_period: must be above attention.shortest_period")
        if self.transfer_from is not None and (self.attention.heads * self.transfer_from) % self.width:
            wrong.append(
                f"transfer_from: attention.heads = {self.attention.heads} at width {self.width} are no whole number of "
                f"heads at {self.transfer_from}"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

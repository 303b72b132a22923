"""Settings of the network that makes vectors of genes from sequences, and of its training.

The network is :mod:`bgen.models.sequences.encoder`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bgen.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

MOST_WORD = 6
"""Bases of a word, at most: there are 4^6 = 4,096 such words."""

SequenceMixer = Literal["hyena", "mamba2", "attention", "convolution"]


class SequenceConfig(Section):
    """A network over the positions of a sequence."""

    mixer: SequenceMixer = Field("hyena", description="What mixes along positions; all see both directions.")
    size: PositiveInt = Field(32, description="Numbers of a gene's vector, F.")
    channels: Annotated[int, Field(gt=0, multiple_of=8)] = Field(32, description="Channels of a position, C.")
    word: Annotated[int, Field(gt=0, le=MOST_WORD)] = Field(
        4, description="Bases that are read together at every position: each word of so many has a row of its own."
    )
    pool: PositiveInt = Field(8, description="Neighbouring positions that are averaged, so that networks are quick.")
    blocks: PositiveInt = Field(1, description="Blocks of a mixer and a layer for each position, K.")
    dropout: Fraction = Field(0.2, description="Dropout in training, of channels within blocks and before the vector.")


class SequenceTraining(Section):
    """How it is trained: by regression of what is known of training genes on their sequences."""

    epochs: PositiveInt = Field(10, description="Passes over the training genes.")
    batch: PositiveInt = Field(64, description="Genes of a step.")
    learning_rate: PositiveFloat = Field(3e-3, description="Peak rate of AdamW; warm-up, then a cosine to zero.")
    weight_decay: NonNegativeFloat = Field(0.05, description="Decay of matrices.")
    shift: NonNegativeInt = Field(4, description="Positions, at most, that a sequence is moved by in training.")

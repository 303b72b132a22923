"""Average effects of perturbations as a model holds them: tables only; what they mean, and how they are asked, is in
:mod:`bgen.effects.effects`.

All effects are differences of log(1 + counts per 10,000) of average cells.

Axes: R sets of perturbations with their dose, C contexts, Q sets in a context, G genes, K features of a context, D
directions of effects.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OF_GENES = ("general", "own", "control", "control_off", "feature_axes", "feature_weights", "network")
"""Tables with a column for each gene."""


class AverageEffects(nn.Module):
    """Buffers of average effects, and of the control cells that they were measured against.

    Attributes
    ----------
    general
        ``[R, G]``: the effect of each set over all contexts.
    cells
        ``[R]``: perturbed cells that it was measured on.
    own, own_of
        ``[Q, G]``: how the effect in a context differs from the general one, and int64 ``[Q, 2]``: context and set.
    control, control_noise, control_off
        ``[C, G]``: log(1 + counts per 10,000) of the average control cell of each context; ``[C]``: by how much
        sampling moves it; ``[C, G]``: what is known of that.
    network
        ``[E', G]``: maps the last E' numbers of the vectors of perturbations to the genes that they regulate.
    feature_axes, feature_weights, codes
        ``[K, G]``, ``[K D, G]`` and ``[R, D]``: the bilinear form in control cells; empty where it is not used.
    """

    decayed = ()
    general: Tensor
    cells: Tensor
    own: Tensor
    own_of: Tensor
    control: Tensor
    control_noise: Tensor
    control_off: Tensor
    feature_axes: Tensor
    feature_weights: Tensor
    codes: Tensor
    network: Tensor

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, table in tables.items():
            self.register_buffer(name, table)

    def with_genes(self, added: int) -> AverageEffects:
        """Return the same for a model with so many genes more, last, of which nothing is known."""
        held = dict(self.named_buffers())
        return AverageEffects(
            {name: F.pad(table, (0, added)) if name in OF_GENES else table for name, table in held.items()}
        )

    @classmethod
    def empty(
        cls,
        sets: int,
        genes: int,
        *,
        contexts: int,
        own: int,
        features: int = 0,
        directions: int = 0,
        regulators: int = 0,
    ) -> AverageEffects:
        """Return tables of zeros, R, G, C, Q, K, D and E' in size, for weights to be loaded into."""
        return cls(
            {
                "general": torch.zeros(sets, genes),
                "cells": torch.zeros(sets),
                "own": torch.zeros(own, genes),
                "own_of": torch.zeros(own, 2, dtype=torch.int64),
                "control": torch.zeros(contexts, genes),
                "control_noise": torch.zeros(contexts),
                "control_off": torch.zeros(contexts, genes),
                "feature_axes": torch.zeros(features, genes),
                "feature_weights": torch.zeros(features * directions, genes),
                "codes": torch.zeros(sets if features else 0, directions),
                "network": torch.zeros(regulators, genes),
            }
        )

"""Which parameters weight decay applies to. DeepSpeed ignores per-parameter marks, so the groups are built here."""

from __future__ import annotations

from typing import Any

from torch import nn

from bgen.models.vae import Encoder

DECAYED = (nn.Linear, Encoder)
"""Modules whose ``weight`` decays: the matrices. (The encoder's holds one row per gene.)"""


def decays(module: nn.Module, name: str) -> bool:
    """Whether weight decay applies to parameter ``name`` of ``module``, the module that owns it.

    A matrix that is pulled to zero makes a simpler map. For everything else zero has no such meaning: it would be one
    certain decay rate (A_log, A_imag, dt_bias), one certain place (embeddings, learned queries), or switch off what a
    fixed number of times is added up (biases, scales of norms, D, S4D's C, short convolutions, dispersions).
    """
    return name == "weight" and isinstance(module, DECAYED)


def undecayed(module: nn.Module) -> set[str]:
    """Full names of the trained parameters that get no weight decay."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad and not decays(owner, name)
    }


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters as at most two optimiser groups: with and without weight decay, in the module's order."""
    without = undecayed(module)
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name not in without], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name in without], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

"""Which parameters weight decay applies to. DeepSpeed ignores per-parameter marks, so the groups are built here."""

from __future__ import annotations

from typing import Any

from torch import nn

# Mamba's parameters that must not decay: log of -A, the skip connection, the bias of the step size.
UNDECAYED_NAMES = frozenset({"bias", "A_log", "D", "dt_bias"})
UNDECAYED_MODULES = (nn.Embedding, nn.EmbeddingBag)


def decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to ``parameter``, called ``name`` in ``module``, the module that owns it.

    It does not for biases, norms, embeddings, Mamba's A_log, D and dt_bias, and anything else with fewer than two
    axes (per-gene dispersions, scales): pulling those to zero has no meaning.
    """
    if parameter.ndim < 2 or name in UNDECAYED_NAMES:
        return False
    kind = type(module).__name__
    return not (isinstance(module, UNDECAYED_MODULES) or kind.endswith("Norm") or "embed" in name.lower())


def undecayed(module: nn.Module) -> set[str]:
    """Full names of the trained parameters that get no weight decay."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad and not decays(owner, name, parameter)
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

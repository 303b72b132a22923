"""Parameters as groups of the optimiser: with and without weight decay (:mod:`bgen.nn.decay`), and by learning rate.

DeepSpeed ignores marks on parameters, so the groups are built here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bgen.nn.decay import decays
from bgen.nn.mup import Transfers


def undecayed(module: nn.Module) -> set[str]:
    """Full names of the trained parameters that get no weight decay."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad and not decays(owner, name)
    }


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters as optimiser groups, in the module's order: with and without weight decay.

    Where the learning rate is transferred from another width (:mod:`bgen.nn.mup`), each of its multiples makes a group
    of its own, with that ``lr_scale``. AdamW decays by learning rate times weight decay, so the weight decay is divided
    by the multiple: then the speed of decay does not depend on the width.
    """
    without = undecayed(module)
    scales = module.learning_rate_scales() if isinstance(module, Transfers) else {}
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decayed, scale = name not in without, scales.get(name, 1.0)
            decay = weight_decay / scale if decayed else 0.0
            group = groups.setdefault((decayed, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
            group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]

"""Which module of a network first gave a number that is not finite: where to look for the origin of a NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def first_not_finite(module: nn.Module, forward: Callable[[], object]) -> str | None:
    """Run a forward pass again and return the first of the module's parts whose output is not finite.

    The parts finish from the inside out, so it is the innermost one, and what came to it was finite. The module itself
    stands for its own formulas, such as the loss. None: everything is finite, so it is the backward pass that is not.

    Parameters
    ----------
    forward
        Calls the module, as training did: in the same mode, with the same batch.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(part: nn.Module, _: Any, output: Any) -> None:
            if found:
                return
            tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                found.append(f"{name} ({type(part).__name__})" if name else f"{type(part).__name__} itself")

        return after

    hooks = [part.register_forward_hook(look(name)) for name, part in module.named_modules()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(found), None)

"""Norms of every layer, on request: how large its gradient is, and what it gives.

A layer is a module that holds trained parameters itself, such as a linear map; it is named as in the network. Hooks
are there only during the forward passes of a step that is looked at, and sums stay on the device until the end of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bgen.distributed import world as ranks

GRADIENT, ACTIVATION = "gradient", "activation"


class LayerNorms:
    """Gradients and activations of the layers of a network, over the global batch of every so many steps.

    Parameters
    ----------
    module
        The network.
    every
        Steps between two that are looked at; 0: none is.
    compiled
        Whether parts of the network are compiled. In steps that are looked at they run as they are written: what is
        compiled has no place for hooks.
    """

    def __init__(self, module: nn.Module, every: int, compiled: bool = False) -> None:
        self.every, self._compiled = every, compiled
        self._root = type(module).__name__
        # What the whole network gives are its losses, which the record has anyway.
        self._layers = {
            name: part
            for name, part in module.named_modules()
            if name and any(p.requires_grad for p in part.parameters(recurse=False))
        }
        self.begin(0)

    def begin(self, step: int) -> None:
        """Say that the step of this number, from 1 on, begins; one that is tried again begins again."""
        self._looking = self.every > 0 and step > 0 and step % self.every == 0
        self._activations: dict[str, tuple[Tensor, int]] = {}
        self._gradients: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Within this, a forward pass is looked at, if the step is; otherwise no layer has a hook."""
        if not self._looking:
            yield
            return
        hooks = [part.register_forward_hook(self._look(name)) for name, part in self._layers.items()]
        try:
            with torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(part: nn.Module, _: Any, output: Any) -> None:
            squares, count = self._activations.get(name, (None, 0))
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
                    squares = _squares(leaf) if squares is None else squares + _squares(leaf)
                    count += leaf.numel()
            if squares is not None:
                self._activations[name] = (squares, count)

        return after

    def backward(self, gradients: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Take in the gradients of a step, by the names of parameters and the same on all ranks, if it is looked at."""
        for name, gradient in gradients() if self._looking else ():
            layer = name.rpartition(".")[0] or self._root
            squares = _squares(gradient)
            self._gradients[layer] = self._gradients[layer] + squares if layer in self._gradients else squares

    def take(self) -> dict[str, float]:
        """Return the norms of a step that was looked at, of all ranks together. The host waits here for the device.

        ``gradient/LAYER`` is the Euclidean norm of the gradient of the layer's parameters, before clipping;
        ``activation/LAYER`` the root mean square of the elements of what the layer gives, over the cells of all ranks.
        """
        if not self._looking:
            return {}
        gradients, activations = self._gradients, self._activations
        names = [name for name in self._layers if name in activations]
        sums = [*gradients.values(), *(activations[name][0] for name in names)]
        values = torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.float64)
        counts = torch.tensor([activations[name][1] for name in names], dtype=torch.float64)
        totals = ranks.all_sum(torch.stack([values[len(gradients) :], counts])).tolist()
        self.begin(0)
        found = {f"{GRADIENT}/{name}": math.sqrt(x) for name, x in zip(gradients, values.tolist(), strict=False)}
        for name, squares, count in zip(names, *totals, strict=True):
            found[f"{ACTIVATION}/{name}"] = math.sqrt(squares / count)
        return found


def _squares(tensor: Tensor) -> Tensor:
    """Return the sum of the squares of a tensor, without another one of its size."""
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32).double().square()

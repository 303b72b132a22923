"""Which parameters weight decay applies to: every module says so of those that it owns itself.

A matrix that is pulled to zero makes a simpler map. For everything else zero has no such meaning: it would be one
certain decay rate (A_log, A_imag, dt_bias), one certain place (embeddings, learned queries), or switch off what a fixed
number of times is added up (biases, scales of norms, D, S4D's C, short convolutions, dispersions).

Of torch's modules the weights of linear layers decay, and nothing else does. A module of another package that owns
parameters (not layers that own them) names those that decay in ``decayed``, an empty tuple if there are none.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Decays(Protocol):
    """A module that says which of its own parameters decay."""

    decayed: tuple[str, ...]


def decays(module: nn.Module, name: str) -> bool:
    """Whether weight decay applies to parameter ``name`` of ``module``, the module that owns it.

    Raises
    ------
    TypeError
        If the module does not say so and is not torch's: a matrix must not lose its weight decay unnoticed.
    """
    if isinstance(module, Decays):
        return name in module.decayed
    kind = type(module)
    if not kind.__module__.startswith("torch."):
        raise TypeError(
            f"{kind.__module__}.{kind.__qualname__} owns the parameter '{name}' and does not say whether it decays: "
            "name those that do in a class attribute 'decayed', a tuple."
        )
    return isinstance(module, nn.Linear) and name == "weight"

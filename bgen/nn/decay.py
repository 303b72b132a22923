"""Which parameters weight decay applies to: every module says so for the parameters that it owns.

A matrix that is pulled to zero makes a simpler map. For everything else zero has no such meaning: it would be a
particular decay rate (A_log, A_imag, dt_bias) or a particular place (embeddings, learned queries), or it would switch
off one of a few terms (biases, scales of norms, D, S4D's C, short convolutions, dispersions).

Among torch's own modules, the weights of linear layers decay and nothing else does. Any other module that owns
parameters itself names those that decay in ``decayed``, which is empty if there are none.
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
        If the module is not torch's and does not say: a matrix must not lose its weight decay unnoticed.
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

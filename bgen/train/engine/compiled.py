"""``torch.compile`` for the blocks of a network, and for small steps beside them.

A block is what a network repeats: a member of its lists of modules called ``blocks``. Each is traced once per shape of
what passes through it, which in training does not change from step to step, and blocks that are alike share what was
compiled. What lies between them (sparse counts, the likelihood) stays as it is written, but for the methods that a
module names in ``compiles``: where many small operators follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

BACKEND = "inductor"


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of all networks within a model."""
    lists = (module for name, module in model.named_modules() if name.endswith("blocks"))
    return [block for module in lists if isinstance(module, nn.ModuleList) for block in module]


def methods_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the methods that modules name in ``compiles``, with their modules."""
    return [(module, name) for module in model.modules() for name in getattr(module, "compiles", ())]


@contextmanager
def compiled(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within this, blocks and methods are compiled at their first use; afterwards they run as they are written."""
    blocks, methods = (blocks_of(model), methods_of(model)) if wanted else ([], [])
    for block in blocks:
        block.compile(backend=BACKEND)
    for module, name in methods:
        setattr(module, name, torch.compile(getattr(module, name), backend=BACKEND))
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # what nn.Module.compile sets, and nothing takes back
        for module, name in methods:
            delattr(module, name)  # the class has it as it is written

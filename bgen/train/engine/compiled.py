"""``torch.compile`` for the blocks of a network.

A block is what a network repeats: a member of its lists of modules called ``blocks``. Each is traced once per shape of
what passes through it, which in training does not change from step to step, and blocks that are alike share what was
compiled. What lies between them (sparse counts, keyed noise, the likelihood) stays as it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

BACKEND = "inductor"


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of all networks within a model."""
    lists = (module for name, module in model.named_modules() if name.endswith("blocks"))
    return [block for module in lists if isinstance(module, nn.ModuleList) for block in module]


@contextmanager
def compiled(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within this, blocks are compiled when they are first used; afterwards they run as they are written."""
    blocks = blocks_of(model) if wanted else []
    for block in blocks:
        block.compile(backend=BACKEND)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # what nn.Module.compile sets, and nothing takes back

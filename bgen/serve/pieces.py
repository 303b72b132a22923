"""JSON of a large answer in pieces, so that it never lies in memory as Python's numbers and as text at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

BLOCK = 8192
"""Values of a piece, at most."""


def values_in(tree: Any) -> int:
    """Return how many values the arrays and lists of an answer hold."""
    if isinstance(tree, Mapping):
        return sum(map(values_in, tree.values()))
    return int(np.size(tree)) if isinstance(tree, np.ndarray) else len(tree) if isinstance(tree, list) else 1


def plain(tree: Any) -> Any:
    """Return mappings, lists, arrays and plain values with lists in place of the arrays."""
    if isinstance(tree, Mapping):
        return {name: plain(value) for name, value in tree.items()}
    return tree.tolist() if isinstance(tree, np.ndarray) else tree


def json_pieces(tree: Any) -> Iterator[str]:
    """Yield the JSON of mappings, lists, arrays and plain values; joined, it is what ``json.dumps`` gives of them."""
    if isinstance(tree, Mapping):
        for number, (name, value) in enumerate(tree.items()):
            yield ("{" if number == 0 else ", ") + json.dumps(name) + ": "
            yield from json_pieces(value)
        yield "}" if tree else "{}"
    elif isinstance(tree, np.ndarray | list) and len(tree):
        rows = max(1, BLOCK // max(1, np.size(tree[0]) if isinstance(tree, np.ndarray) else 1))
        for first in range(0, len(tree), rows):
            yield ("[" if first == 0 else ", ") + json.dumps(plain(tree[first : first + rows]))[1:-1]
        yield "]"
    else:
        yield json.dumps(plain(tree))

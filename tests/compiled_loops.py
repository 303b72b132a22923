"""Prints a hash of what each compiled loop makes of fixed inputs, as JSON: ``python compiled_loops.py nb ssd ...``.

Axes: B cells, G genes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bgen.models.likelihoods import sparse_cpu as nb_cpu
from bgen.models.vae.thinning_cpu import thin_small
from bgen.nn.cpu import sparse as sparse_cpu

PARTS = (1, 2)


@dataclass
class Counts:
    """A CSR matrix of counts ``[B, G]``, with some above what is looked up in tables."""

    rng: np.random.Generator
    B: int
    G: int

    def __post_init__(self) -> None:
        dense = self.rng.poisson(0.4, (self.B, self.G)).astype(np.float32)
        dense[:, :3] *= 40
        self.indptr = np.concatenate([[0], (dense > 0).sum(axis=1).cumsum()]).astype(np.int64)
        self.indices = dense.nonzero()[1].astype(np.int32)
        self.counts = dense[dense > 0]
        self.library = dense.sum(axis=1)


def forward(rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """The likelihood alone, which calls the most helpers."""
    yield from itertools.islice(nb(rng), 2)


def nb(rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    x = Counts(rng, B=24, G=203)  # not a whole number of vectors
    log_theta = rng.standard_normal(x.G).astype(np.float32) + 1
    theta = np.exp(log_theta)
    logits = rng.standard_normal((x.B, x.G)).astype(np.float32)
    grad = rng.standard_normal(x.B).astype(np.float32)
    terms, slopes = nb_cpu.tables(theta)
    yield "tables", (terms, slopes)
    for parts in PARTS:
        ratio, out, grad_logits = np.empty_like(logits), np.empty(x.B, np.float32), np.empty_like(logits)
        sparse = (x.indptr, x.indices, x.counts)
        nb_cpu.forward(parts, terms, logits, log_theta, theta, x.library, *sparse, ratio, out)
        yield f"forward in {parts}", (ratio, out)
        shares = nb_cpu.backward(parts, slopes, grad, theta, x.library, *sparse, ratio, grad_logits)
        yield f"backward in {parts}", (shares, grad_logits)


def sparse(rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    x = Counts(rng, B=24, G=203)
    weight = rng.standard_normal((x.G, 37)).astype(np.float32)
    for parts in PARTS:
        product, normalised = np.empty((x.B, 37), np.float32), np.empty_like(x.counts)
        sparse_cpu.product(x.indptr, x.indices, x.counts, weight, parts, product)
        sparse_cpu.log_normalise(x.indptr, x.counts, 1e4, parts, normalised)
        yield f"sparse in {parts}", (product, normalised)
        yield f"transpose in {parts}", sparse_cpu.transpose(x.indptr, x.indices, x.counts, x.G, parts)


def thinning(rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    x = Counts(rng, B=24, G=203)
    state = rng.integers(0, 2**63, x.B).astype(np.uint64)
    keep = rng.uniform(0.3, 1, x.B).astype(np.float32)
    for parts in PARTS:
        found = thin_small(x.indptr, x.indices, x.counts, state, rng.random(x.B) < 0.8, keep, 32, parts)
        yield f"thinned in {parts}", found


def scan(rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    import torch  # the other loops do without it: two processes need not wait for it

    from bgen.nn.scans import ssd

    torch.set_num_threads(1)
    shapes = {"x": (2, 37, 4, 16), "a": (2, 37, 4), "b": (2, 37, 1, 16), "c": (2, 37, 1, 16)}
    t = {name: torch.tensor(rng.standard_normal(shape), dtype=torch.float32) for name, shape in shapes.items()}
    t["a"] = -0.1 * t["a"].abs()
    for tensor in t.values():
        tensor.requires_grad_()
    y, _ = ssd.ssd_chunked(t["x"], t["a"], t["b"], t["c"])
    y.square().sum().backward()
    yield "ssd", (y.detach().numpy(), *(tensor.grad.numpy() for tensor in t.values()))  # type: ignore[union-attr]


LOOPS: dict[str, Callable[[np.random.Generator], Iterator[tuple[str, Any]]]] = {
    "forward": forward,
    "nb": nb,
    "sparse": sparse,
    "thinning": thinning,
    "ssd": scan,
}


def sha(arrays: tuple[NDArray[Any], ...]) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


if __name__ == "__main__":
    made = {name: sha(arrays) for loop in sys.argv[1:] for name, arrays in LOOPS[loop](np.random.default_rng(0))}
    print(json.dumps(made))

"""Keyed random order: 64-bit hashes of integers, the same on every machine and in every version of numpy.

The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2714064.2660195).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(key: ArrayLike) -> NDArray[np.uint64]:
    """Return a bijective mixing of 64-bit integers, elementwise."""
    with np.errstate(over="ignore"):
        x = np.asarray(key).astype(np.uint64) + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_keys(*parts: ArrayLike) -> NDArray[np.uint64]:
    """Return a 64-bit hash of several integers (or arrays of them, broadcast together)."""
    key = np.zeros((), np.uint64)
    for part in parts:
        key = mix(key ^ np.asarray(part).astype(np.uint64))
    return key


def hash_text(text: str) -> int:
    """Return a 63-bit hash of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """Return the permutation of ``range(n)`` that belongs to ``key``."""
    return np.argsort(hash_keys(*key, np.arange(n)), kind="stable")

"""The seed of a step: what modules draw from torch's own generator is the same after a restart."""

from __future__ import annotations

import hashlib

import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step on one rank, so that dropout is the same after a restart without saving any state."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    # torch.manual_seed asks every kind of device, which takes a twentieth of a small model's step.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)

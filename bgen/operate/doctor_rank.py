"""One of the two ranks that `bgen doctor` starts: meet, sum, check the sum, say how fast."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from bgen.distributed import world as ranks

ELEMENTS = 1_000_000
ROUNDS = 10


def main() -> None:
    """Run on every rank."""
    here = ranks.start(timeout=60)
    values = torch.full((ELEMENTS,), float(here.rank + 1), device=here.device)
    dist.all_reduce(values.clone())  # the first one also makes the connections
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        total = values.clone()
        dist.all_reduce(total)
    expected = here.size * (here.size + 1) / 2
    assert bool((total == expected).all()), f"rank {here.rank}: {total[0]} instead of {expected}"
    seconds = (time.perf_counter() - begin) / ROUNDS
    if here.is_main:
        rate = 4 * ELEMENTS / 1e6 / seconds
        print(f"sum {here.size} ranks on {here.device.type}: 4 MB in {1e3 * seconds:.1f} ms ({rate:.0f} MB/s)")
    ranks.stop()


if __name__ == "__main__":
    main()

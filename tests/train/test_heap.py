from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from bgen.train.heap import keep_heap
if sys.argv[1] == "keep":
    assert keep_heap()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(4_000_000)
before = faults()
for _ in range(20):
    tensors = [torch.ones(4_000_000) for _ in range(3)]
    del tensors
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_memory_is_not_fetched_from_the_system_again() -> None:
    found = {}
    for how in ("default", "keep"):
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        found[how] = int(done.stdout)
    # 48 MB a round are 11,700 pages of 4 kB, or 23 of 2 MB.
    assert found["keep"] < 0.3 * found["default"]

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

CODE = """
import ctypes, sys, torch
from bgen.train.heap import keep_heap
if sys.argv[1] == "keep":
    assert keep_heap()
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # <malloc.h>
Heap = type("Heap", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names.split()]})
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Heap
def held():
    heap = mallinfo2()
    return heap.arena + heap.hblkhd
tensors = [torch.ones(6_000_000) for _ in range(3)]
before = held()
del tensors
print(before - held())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc tells how large its heap is since 2.33")
def test_memory_is_not_given_back_to_the_system() -> None:
    """Of the 72 MB of three tensors, when they are gone."""
    given_back = {}
    for how in ("default", "keep"):
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        given_back[how] = int(done.stdout)
    assert given_back["default"] > 70e6
    assert given_back["keep"] < 1e6

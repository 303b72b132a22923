from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

CODE = """
import ctypes, os, torch
from bgen.train.heap import keep_heap
child = os.fork()  # by default, and then in this process kept
if child:
    assert os.waitpid(child, 0)[1] == 0
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
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    by_default, kept = map(int, done.stdout.split())
    assert by_default > 70e6
    assert kept < 1e6

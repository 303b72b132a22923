from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bgen.nn.cpu.threads import WORTH, parts

LOADED = """
import os
from bgen.nn.cpu.threads import parts
import numba, numpy, scipy.linalg, torch
from bgen.data.batch import CellBatch
from bgen.models.vae.sparse_linear import sparse_matmul
"""

SPARSE = """
torch.set_num_threads(1)
x = (torch.rand(64, 500) < 0.1).float()
rows, columns = x.nonzero(as_tuple=True)
indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (x != 0).sum(dim=1).cumsum(0)))
ids = torch.arange(64)
batch = CellBatch(indptr, columns.int(), x[rows, columns], 500, keys=ids, cells=ids)
sparse_matmul(torch.rand(500, 64), batch, batch.counts)
print(torch.get_num_threads(), flush=True)
"""

PARALLEL = """
@numba.njit(parallel=True)
def fill(x):
    for i in numba.prange(2):
        x[i] = 1
torch.set_num_threads(2)
torch.zeros(1 << 22).add_(1)
before = len(os.listdir("/proc/self/task"))
assert parts(2, 1 << 30) == 2
fill(numpy.zeros(2))
print(numba.threading_layer(), len(os.listdir("/proc/self/task")) - before, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads of a process cannot be counted")
def test_numbas_loops_run_on_torchs_threads_and_do_not_change_them() -> None:
    # each in a process of its own, since numba starts its threads once; they share what takes long to import
    code = f"{LOADED}if os.fork() == 0:\n    exec({SPARSE!r})\n    os._exit(0)\nassert os.wait()[1] == 0\n{PARALLEL}"
    given = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_THREADING")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**given, "NUMBA_NUM_THREADS": "2"},
    )
    assert done.stdout.splitlines() == ["1", "omp 0"]


@pytest.mark.parametrize(("rows", "work", "expected"), [(1, 100 * WORTH, 1), (100, WORTH, 1), (0, 0, 1)])
def test_parts(rows: int, work: int, expected: int) -> None:
    assert parts(rows, work) == expected
    assert parts(1000, 1000 * WORTH) <= torch.get_num_threads()

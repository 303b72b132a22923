"""``bgen bench loader --latency``: a store read from a server that answers late, beside the same store on the disk.

The server (:mod:`bgen.bench.loaders.distant`) runs on this machine and waits before it answers, so that only the
latency is that of a distant one. Each measurement has a process and an empty cache of its own, and ends before a cell
comes a second time; repetitions are interleaved and medians reported.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bgen.bench.loaders.worker import WARM_UP, cpu_seconds, private_mb
from bgen.config.data import Access
from bgen.data.loader import CountReader, TrainLoader
from bgen.errors import UserError
from bgen.files import write_result
from bgen.progress import Say
from bgen.store.open import open_store

BATCH = 1024
NUMBERS = ("open_s", "first_batch_s", "wall_rate", "cpu_rate", "private_mb", "most")


def bench_remote(
    out: Path,
    store: Path,
    latencies: Sequence[int],
    *,
    requests: int = 64,
    seconds: float = 4.0,
    repetitions: int = 3,
    say: Say = print,
) -> list[dict[str, Any]]:
    """Measure a store on the disk and at several latencies, print a table, and write ``remote.json`` into ``out``.

    Parameters
    ----------
    latencies
        Milliseconds from a request to its answer.
    requests
        Requests at a time (``data.access.threads``).
    seconds
        How long each measurement takes at most, after a warm-up of a quarter of it.

    Raises
    ------
    UserError
        If a process fails.
    """
    records: dict[int | None, list[dict[str, float]]] = {late: [] for late in (None, *latencies)}
    with serve_late(store.parent) as url:
        for repetition in range(repetitions):
            for late, found in records.items():
                where = str(store) if late is None else f"{url}/{late}/{store.name}"
                what = "on the disk" if late is None else f"at {late} ms"
                say(f"repetition {repetition + 1} of {repetitions}: {what}")
                most_waiting(url)
                job = {"where": where, "threads": requests, "seconds": seconds}
                found.append(_apart(job) | {"most": float(most_waiting(url))})
    rows: list[dict[str, Any]] = [
        {"latency_ms": late, **{name: statistics.median(one[name] for one in found) for name in NUMBERS}}
        for late, found in records.items()
    ]
    for row in rows:
        row["over_local"] = row["wall_rate"] / rows[0]["wall_rate"]
    say(table(rows))
    out.mkdir(parents=True, exist_ok=True)
    about = {"requests": requests, "seconds": seconds, "repetitions": repetitions, "rows": rows}
    write_result(out / "remote.json", json.dumps(about, indent=1) + "\n")
    say(f"Written: {out / 'remote.json'}")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return what was measured as a Markdown table."""
    heads = ["latency", "opened in", "first batch", "cells/s", "over local", "memory", "most requests at once"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        late = "on the disk" if row["latency_ms"] is None else f"{row['latency_ms']} ms"
        lines.append(
            f"| {late} | {row['open_s']:.2f} s | {row['first_batch_s']:.2f} s | {row['wall_rate']:,.0f} |"
            f" {row['over_local']:.2f} | {row['private_mb']:,.0f} MB | {row['most']:.0f} |"
        )
    return "\n".join(lines)


@contextmanager
def serve_late(folder: Path) -> Iterator[str]:
    """Serve a folder as :mod:`bgen.bench.loaders.distant` does, and give the server's address."""
    command = [sys.executable, "-m", "bgen.bench.loaders.distant", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.terminate()


def most_waiting(url: str) -> int:
    """Return how many requests were at the server at once, since this was last asked."""
    with urllib.request.urlopen(f"{url}/most", timeout=60) as answer:
        return int(answer.read())


def measure(where: str, threads: int, seconds: float, cache: Path) -> dict[str, float]:
    """Measure one store: seconds to open it and to its first batch, packed cells per second, memory."""
    began = time.perf_counter()
    store = open_store(where, threads=1, access=Access(cache=cache, threads=threads))
    opened = time.perf_counter()
    order = store.order("train", batch=BATCH, lanes=8, window=16, seed=0)
    batches = TrainLoader(CountReader(store), order, seed=0).packed_steps()
    left = len(store.split("train")) // BATCH - 1
    next(batches)
    first = time.perf_counter()
    while time.perf_counter() - first < WARM_UP * seconds and left > 1:
        next(batches)
        left -= 1
    wall, cpu, cells, peak = time.perf_counter(), cpu_seconds(), 0, private_mb()
    while not cells or (time.perf_counter() - wall < seconds and left > 0):
        cells += sum(len(one) for one in next(batches))
        peak, left = max(peak, private_mb()), left - 1
    passed, spent = time.perf_counter() - wall, cpu_seconds() - cpu
    if hasattr(batches, "close"):
        batches.close()
    return {
        "open_s": opened - began,
        "first_batch_s": first - opened,
        "wall_rate": cells / passed,
        "cpu_rate": cells / max(spent, 0.01),
        "private_mb": peak,
    }


def _apart(job: dict[str, Any]) -> dict[str, float]:
    """Measure in a process and with a cache of its own.

    Raises
    ------
    UserError
        If it fails.
    """
    with tempfile.TemporaryDirectory(prefix="bgen-remote-") as cache:
        command = [sys.executable, "-m", "bgen.bench.loaders.remote", json.dumps({**job, "cache": cache})]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"Reading {job['where']} failed: what it said stands above.")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(measure(task["where"], task["threads"], task["seconds"], Path(task["cache"]))), flush=True)
    os._exit(0)

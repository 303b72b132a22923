"""Measure one loader in a process of its own: ``python worker.py JSON``, which prints JSON.

This file runs in the loader's own Python environment, which may have another Python and no bgen. So it imports bgen
only to measure bgen.

A loader is a function ``(job) -> open``: it imports what it needs; ``open()`` returns an endless iterator over
``(cells in the batch, their types or None)``. The clock of the first batch starts at ``open()``.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Batches = Iterator[tuple[int, Any]]
WARM_UP = 0.25
"""Length of the warm-up, as a share of the measured seconds."""


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes
    ----------
    loader
        Name of a loader below.
    path
        What it reads.
    batch
        Cells per batch.
    form
        "packed", "csr" or "dense": what a batch is at the end, as torch tensors or scipy matrices on the CPU;
        "trajectories": CSR of populations, 32 cells at each of 8 times, that are spread over the store.
    threads
        Threads that decode, where the loader can be told.
    seconds
        How long to measure.
    types
        ``.npy`` file with the type of every cell of the atlas, to count types per batch; None: do not.
    """

    loader: str
    path: str
    batch: int
    form: str
    threads: int
    seconds: float
    types: str | None


def bgen(job: Job) -> Callable[[], Batches]:
    """Measure a bgen store; its cells carry their types."""
    import torch

    from bgen.data.loader import CountReader, TrainLoader
    from bgen.store.store import Store

    def open_() -> Batches:
        store = Store(job.path, threads=job.threads)
        if job.form == "trajectories":
            for (batch,) in _trajectories(store, job).steps():
                yield len(batch), batch.obs["cell_type"].numpy() if job.types else None
        order = store.order("train", batch=job.batch, lanes=8, window=16, seed=0)
        loader = TrainLoader(CountReader(store, ["cell_type"] if job.types else []), order, seed=0)
        dense = torch.empty(job.batch if job.form == "dense" else 0, store.manifest.n_genes)
        if job.form == "csr":
            for (csr,) in loader.steps():
                yield len(csr), csr.obs["cell_type"].numpy() if job.types else None
        for (packed,) in loader.packed_steps():
            if job.form == "dense":
                packed.densify(dense)
            yield len(packed), packed.obs["cell_type"].numpy() if job.types else None

    return open_


def _trajectories(store: Any, job: Job) -> Any:
    """Return the loader of courses of the batches of the atlas, at times that are made up."""
    import numpy as np

    from bgen.config.data import TrajectoriesConfig
    from bgen.data.loader import CountReader
    from bgen.data.trajectory_loader import TrajectoryLoader
    from bgen.order.keys import hash_keys
    from bgen.order.pools import PooledTrajectories
    from bgen.order.trajectories import Trajectories

    shape, cells = TrajectoriesConfig(), store.cells_of_split("train")
    time = (hash_keys(0, cells) % np.uint64(shape.times)).astype(np.float32)
    courses = Trajectories.over_time(cells, [store.column("batch")[1][cells]], time, np.zeros(len(cells), bool))
    order = PooledTrajectories(
        courses.shuffled_within(np.zeros(len(cells), np.uint8)),
        batch=max(1, job.batch // shape.size),
        times=shape.times,
        cells=shape.cells,
        seed=0,
        name="bench",
        lanes=8,
        pool=shape.pool,
        first_cell=store.first_cell,
    )
    reader = CountReader(store, ["cell_type"] if job.types else [])
    return TrajectoryLoader(reader, order, seed=0, micro_batch=order.batch)


def annbatch(job: Job) -> Callable[[], Batches]:
    """Measure annbatch's default: 512 rows x 32 chunks, zarrs, torch."""
    import zarr
    import zarrs  # noqa: F401, which makes the pipeline known
    from annbatch import DatasetCollection, Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})

    def load(group: Any) -> Any:
        import anndata

        obs = anndata.io.read_elem(group["obs"])[["cell_type"] if job.types else []]
        return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]), obs=obs)

    def open_() -> Batches:
        collection = DatasetCollection(zarr.open_group(job.path, mode="r"))
        loader = Loader(shuffle=True, batch_size=job.batch, preload_to_gpu=False, to="torch")
        loader.use_collection(collection, load_adata=load)
        while True:
            for batch in loader:
                counts = batch["X"].to_dense() if job.form == "dense" else batch["X"]
                yield counts.shape[0], batch["obs"]["cell_type"].cat.codes.to_numpy() if job.types else None

    return open_


def cellstream(job: Job) -> Callable[[], Batches]:
    """Measure cellstream's rows, truly at random."""
    import cellstream as package
    import numpy as np

    def open_() -> Batches:
        store = package.open(job.path)
        types = np.load(job.types) if job.types else None
        rng = np.random.default_rng(0)
        while True:
            rows = rng.permutation(store.n_obs)
            for start in range(0, len(rows) - job.batch + 1, job.batch):
                some = rows[start : start + job.batch]
                counts = store.gather_rows(some, n_threads=job.threads)
                if job.form == "dense":
                    counts = counts.toarray()
                yield counts.shape[0], None if types is None else types[some]

    return open_


def scdl(job: Job) -> Callable[[], Batches]:
    """Measure bionemo-scdl: rows at random, collated into torch CSR."""
    import numpy as np
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    from torch.utils.data import DataLoader

    def open_() -> Batches:
        data = SingleCellMemMapDataset(job.path)
        types = np.load(job.types) if job.types else None
        rng = np.random.default_rng(0)
        while True:
            rows = rng.permutation(len(data))[: len(data) // job.batch * job.batch]
            loader = DataLoader(
                data, batch_size=job.batch, sampler=rows.tolist(), collate_fn=collate_sparse_matrix_batch
            )
            for number, batch in enumerate(loader):
                some = rows[number * job.batch :][: job.batch]
                counts = batch.to_dense() if job.form == "dense" else batch
                yield counts.shape[0], None if types is None else types[some]

    return open_


def scdataset(job: Job) -> Callable[[], Batches]:
    """Measure scDataset over the h5ad: blocks of 64 rows, 16 batches fetched at once."""
    import anndata
    import h5py
    import numpy as np
    from scdataset import BlockShuffling, scDataset

    class Rows:
        """The rows of X as they are read from the file, ascending; AnnData's own class has no length."""

        def __init__(self) -> None:
            self.matrix = anndata.io.sparse_dataset(h5py.File(job.path)["X"])

        def __len__(self) -> int:
            return int(self.matrix.shape[0])

        def __getitem__(self, rows: Any) -> Any:
            return self.matrix[rows]

    def open_() -> Batches:
        rows = np.load(job.types) if job.types else Rows()
        data = scDataset(rows, BlockShuffling(block_size=64), batch_size=job.batch, fetch_factor=16, drop_last=True)
        while True:
            for batch in data:
                if job.form == "dense":
                    batch = batch.toarray()
                yield batch.shape[0], batch if job.types else None

    return open_


def webdataset(job: Job) -> Callable[[], Batches]:
    """Measure WebDataset over blocks of 256 cells, as scipy CSR."""
    import numpy as np
    import scipy.sparse as sp
    import webdataset as package
    import zstandard

    def open_() -> Batches:
        shards = sorted(str(path) for path in Path(job.path).glob("*.tar"))
        types = np.load(job.types) if job.types else None
        unpack = zstandard.ZstdDecompressor().decompress
        data = package.WebDataset(shards, shardshuffle=len(shards)).shuffle(64)
        blocks = job.batch // 256
        while True:
            samples = iter(data)
            while len(some := list(itertools.islice(samples, blocks))) == blocks:
                parts = []
                for sample in some:
                    indptr = np.frombuffer(sample["indptr"], np.int64)
                    counts = np.frombuffer(unpack(sample["counts"]), np.uint16).astype(np.float32)
                    indices = np.frombuffer(unpack(sample["indices"]), np.uint16).astype(np.int32)
                    parts.append(sp.csr_matrix((counts, indices, indptr), shape=(len(indptr) - 1, 65_536)))
                matrix = sp.vstack(parts, format="csr")
                rows = np.concatenate([np.frombuffer(sample["cells"], np.int64) for sample in some])
                if job.form == "dense":
                    matrix = matrix.toarray()
                yield matrix.shape[0], None if types is None else types[rows]

    return open_


LOADERS = {f.__name__: f for f in (bgen, annbatch, cellstream, scdl, scdataset, webdataset)}
PACKAGES = {"bgen": "tensorstore", "scdl": "bionemo-scdl"}
"""Package whose version is the loader's, where it has another name."""


def cpu_seconds() -> float:
    """Return user and system time of this process, its threads and its children."""
    return sum(os.times()[:4])


def private_mb() -> float:
    """Return the resident memory that is not shared with files or other processes, in MB."""
    _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(job: Job) -> dict[str, Any]:
    """Run one job: rates in cells per second, times in seconds, memory in MB."""
    open_ = LOADERS[job.loader](job)
    began = time.perf_counter()
    batches = open_()
    next(batches)
    first = time.perf_counter() - began
    while time.perf_counter() - began < first + WARM_UP * job.seconds:
        next(batches)
    peak = private_mb()
    wall, cpu, cells, found = time.perf_counter(), cpu_seconds(), 0, []
    while (passed := time.perf_counter() - wall) < job.seconds:
        n, types = next(batches)
        cells += n
        peak = max(peak, private_mb())
        if types is not None:
            found.append(len(set(types.tolist())))
    spent = cpu_seconds() - cpu
    if hasattr(batches, "close"):
        batches.close()
    return {
        "wall_rate": cells / passed,
        "cpu_rate": cells / spent,
        "first_batch_s": first,
        "private_mb": peak,
        "types": sum(found) / len(found) if found else None,
        "version": importlib.metadata.version(PACKAGES.get(job.loader, job.loader)),
        "python": sys.version.split()[0],
    }


def convert(loader: str, h5ad: str, out: str) -> None:
    """Write the atlas in a loader's own format, as its documentation says."""
    if loader == "annbatch":
        from annbatch import DatasetCollection

        # 3 GB at once instead of 20, for machines of this size; shuffling is finer than any batch all the same
        DatasetCollection(out).add_adatas([h5ad], dataset_size="3GB")
    elif loader == "cellstream":
        import cellstream as package

        package.write_sharded(h5ad, out, layout="cell")
    elif loader == "scdl":
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

        SingleCellMemMapDataset(out, h5ad_path=h5ad, use_X_not_raw=True, paginated_load_cutoff=1_000).save()
    elif loader == "webdataset":
        _write_webdataset(h5ad, Path(out))


def _write_webdataset(h5ad: str, out: Path) -> None:
    """Write shuffled tar shards of 32 blocks of 256 cells, two byte streams each in zstd-3."""
    import anndata
    import h5py
    import numpy as np
    import webdataset as package
    import zstandard

    pack = zstandard.ZstdCompressor(level=3).compress
    out.mkdir()
    with h5py.File(h5ad) as file:
        matrix = anndata.io.sparse_dataset(file["X"])
        line = np.random.default_rng(0).permutation(matrix.shape[0]).astype(np.int64)
        for number, start in enumerate(range(0, len(line), 8192)):
            rows = line[start : start + 8192]
            ascending = np.argsort(rows)
            counts = matrix[rows[ascending]][np.argsort(ascending)]
            with package.TarWriter(str(out / f"{number:05d}.tar")) as tar:
                for low in range(0, len(rows) - 255, 256):
                    part = counts[low : low + 256]
                    tar.write(
                        {
                            "__key__": f"{number:05d}-{low:05d}",
                            "indptr": part.indptr.astype(np.int64).tobytes(),
                            "indices": pack(part.indices.astype(np.uint16).tobytes()),
                            "counts": pack(part.data.astype(np.uint16).tobytes()),
                            "cells": rows[low : low + 256].tobytes(),
                        }
                    )


def main() -> None:
    """Measure or convert, as the JSON in the argument says."""
    task = json.loads(sys.argv[1])
    if "convert" in task:
        convert(task["convert"], task["h5ad"], task["out"])
        return
    try:
        import torch

        torch.set_num_threads(1)
    except ImportError:
        pass
    print(json.dumps(measure(Job(**task))), flush=True)
    os._exit(0)  # threads of the loaders may wait for ever


if __name__ == "__main__":
    main()

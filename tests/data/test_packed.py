from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from bgen.data.loader import CountReader, TrainLoader
from bgen.data.packed import PackedBatch, unpack, unpack_into
from bgen.store.store import Store
from data_tools.building.write import Contents


@pytest.fixture(scope="module")
def batches(store: Store) -> list[PackedBatch]:
    order = store.order("train", batch=96, lanes=4, window=2, seed=5)
    loader = TrainLoader(CountReader(store, ["cell_type"]), order, seed=5)
    return [loader.read_packed(step)[0] for step in range(8)]


def truth(store: Store, contents: Contents, cells: Tensor) -> np.ndarray:
    genes = np.array([int(gene[4:]) for gene in store.genes["id"]])
    return contents.counts[store.source_of(cells.numpy())[1]][:, genes].toarray()


def test_all_ways_to_unpack_agree(store: Store, contents: Contents, batches: list[PackedBatch]) -> None:
    assert any(len(batch.overflow) for batch in batches)
    assert any(len(batch.gaps) > len(batch.counts) for batch in batches)  # gaps of 255 and more
    for batch in batches:
        wanted = truth(store, contents, batch.cells)
        csr = batch.to_csr()
        made = sp.csr_matrix((csr.counts, csr.indices, csr.indptr), shape=wanted.shape)
        assert np.array_equal(made.toarray(), wanted)
        indices, counts = unpack(batch)
        assert torch.equal(indices, csr.indices)
        assert torch.equal(counts, csr.counts)
        assert np.array_equal(batch.densify().numpy(), wanted)
        dirty = torch.full((len(batch) + 3, batch.n_genes), -7.0)
        assert np.array_equal(batch.densify(dirty).numpy(), wanted)
        assert torch.all(dirty[len(batch) :] == -7.0)
        assert np.array_equal(unpack_into(batch, dirty[: len(batch)]).numpy(), wanted)


def test_a_packed_batch_carries_what_its_csr_form_does(store: Store, batches: list[PackedBatch]) -> None:
    order = store.order("train", batch=96, lanes=4, window=2, seed=5)
    loader = TrainLoader(CountReader(store, ["cell_type"]), order, seed=5)
    for step, packed in enumerate(batches):
        wanted = loader.read(step)[0]
        for batch in (packed.to_csr(), packed.to("cpu").to_csr()):
            for name in ("indptr", "indices", "counts", "keys", "cells"):
                assert torch.equal(getattr(batch, name), getattr(wanted, name))
            assert (batch.n_genes, batch.step, batch.first_slot) == (wanted.n_genes, step, 0)
            assert torch.equal(batch.obs["celltype"], wanted.obs["celltype"])


def test_cells_without_counts() -> None:
    batch = PackedBatch(
        gaps=torch.tensor([255, 0, 3], dtype=torch.uint8),
        counts=torch.tensor([255, 9], dtype=torch.uint8),
        overflow=torch.tensor([-1], dtype=torch.int32),  # 2^32 - 1
        gap_start=torch.tensor([0, 0, 2, 3, 3]),
        indptr=torch.tensor([0, 0, 1, 2, 2]),
        n_genes=300,
        keys=torch.zeros(4, dtype=torch.int64),
        cells=torch.arange(4),
    )
    wanted = torch.zeros(4, 300)
    wanted[1, 255], wanted[2, 3] = 2.0**32 - 1, 9
    assert torch.equal(batch.densify(), wanted)
    assert torch.equal(unpack_into(batch, torch.empty(4, 300)), wanted)
    assert batch.to_csr().indices.tolist() == unpack(batch)[0].tolist() == [255, 3]
    nothing = PackedBatch(
        *(torch.empty(0, dtype=dtype) for dtype in (torch.uint8, torch.uint8, torch.int32)),
        gap_start=torch.zeros(3, dtype=torch.int64),
        indptr=torch.zeros(3, dtype=torch.int64),
        n_genes=300,
        keys=torch.zeros(2, dtype=torch.int64),
        cells=torch.arange(2),
    )
    assert torch.equal(nothing.densify(), torch.zeros(2, 300))
    assert torch.equal(unpack_into(nothing, torch.empty(2, 300)), torch.zeros(2, 300))


def test_batches_that_are_kept_are_not_written_over(store: Store) -> None:
    order = store.order("train", batch=64, lanes=4, window=2, seed=1)
    loader = TrainLoader(CountReader(store), order, seed=1, prefetch=1)
    stream = loader.packed_steps()
    kept = [next(stream)[0] for _ in range(40)]
    csr = [batch.to_csr() for batch in kept]
    stream.close()
    again = TrainLoader(CountReader(store), order, seed=1)
    for step, (packed, unpacked) in enumerate(zip(kept, csr, strict=True)):
        wanted = again.read(step)[0]
        assert torch.equal(packed.densify(), wanted_dense(wanted))
        assert torch.equal(unpacked.counts, wanted.counts)


def wanted_dense(batch: object) -> Tensor:
    dense = torch.zeros(len(batch), batch.n_genes)
    dense[batch.rows, batch.indices.long()] = batch.counts
    return dense

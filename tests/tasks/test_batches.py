"""Batches by memory: cells are the same in batches of any size, and half of a batch is tried where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import bgen as library
from bgen.errors import UserError
from bgen.tasks import batches
from bgen.tasks.batches import Batches
from bgen.tasks.load import Model

CPU = torch.device("cpu")
MODELS = Path(__file__).parents[1] / "hub" / "fixtures_0_1_0"
"""Small trained models, and cells for them."""


@pytest.fixture(scope="module")
def flow() -> Model:
    return library.load(MODELS / "flow")


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """300 cells, so that an encoder meets several batches; so sparse that all of these are multiplied as such."""
    table = pd.read_csv(MODELS / "cells.csv", index_col=0)
    genes = [name for name in table.columns if name.startswith("G")]
    counts = np.random.default_rng(0).poisson(0.2 * np.tile(table[genes].to_numpy(), (5, 1))).astype(np.float32)
    obs = pd.concat([table.drop(columns=genes)] * 5, ignore_index=True)
    obs.index = obs.index.astype(str)
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))


@contextmanager
def sizes(first: int, later: int) -> Iterator[list[int]]:
    """Within this, batches have these sizes on a CPU, whatever the memory; how many cells each had is gathered."""
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        over = Batches.over

        def counted(self: Batches, n: int, compute: Any, **rest: Any) -> Any:
            self.size, self.most, self._measured = min(first, self.most), later, first == later

            def noted(start: int, stop: int) -> Any:
                seen.append(stop - start)
                return compute(start, stop)

            return over(self, n, noted, **rest)

        patch.setattr(Batches, "over", counted)
        yield seen


def equal(one: Any, other: Any) -> None:
    arrays = (values.toarray() if sp.issparse(values) else values for values in (one, other))
    np.testing.assert_array_equal(*arrays)


def test_cells_are_the_same_in_batches_of_any_size(flow: Model) -> None:
    made = []
    for size in (37, 90, 400):
        with sizes(size, size) as seen:
            made.append(flow.generate(250, seed=5).X)
        assert max(seen) == min(size, 250)
        assert len(seen) == -(-250 // size)
    equal(made[0], made[1])
    equal(made[0], made[2])
    equal(made[0], flow.generate(250, seed=5).X)


def test_what_is_read_of_cells_is_the_same_in_batches_of_any_size(flow: Model, cells: anndata.AnnData) -> None:
    found = []
    for size in (33, 128, 1000):
        with sizes(size, size) as seen:
            mean, variance = flow.encode(cells)
            found.append((mean, variance, flow.denoise(cells).layers["denoised"]))
        assert max(seen) == min(size, cells.n_obs)
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            equal(one, same)


def test_courses_are_the_same_in_batches_of_any_size(cells: anndata.AnnData) -> None:
    model = library.load(MODELS / "course")
    found, tables = [], []
    for size in (1, 3, 100):
        with sizes(size, size):
            parts = [model.generate(30, times="all", seed=2), model.interpolate(cells, 24.0, n=60, seed=2)]
        found.append(np.concatenate([part.X.toarray() for part in parts]))
        tables.append(pd.concat([part.obs for part in parts]))
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    for other in found[1:]:  # a course alone is a matrix of few rows, whose products may differ in their last bits
        assert (other == found[0]).mean() > 0.99


def test_an_adaptive_solver_takes_the_cells_that_it_always_took(flow: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ENTRIES", 100 * 60)
    made = []
    for size in (20, 400):
        with sizes(size, size) as seen:
            made.append(flow.generate(250, seed=5, solver="adaptive").X)
        assert seen == [100, 100, 50]
    equal(*made)


def test_the_first_batch_is_measured_and_the_others_fit_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    each = 1 << 12  # bytes of a cell, as float32
    free = 410 * each / batches.FILL

    def compute(start: int, stop: int) -> int:
        torch.zeros(stop - start, each // 4)
        return stop - start

    monkeypatch.setattr(batches, "free_on", lambda device, processes=1: free)
    assert list(Batches(CPU, 1000).over(1500, compute)) == [256, 384, 384, 384, 92]
    assert list(Batches(CPU, 300).over(1000, compute)) == [256, 288, 288, 168]
    assert list(Batches(CPU, 1000, dense=each).over(700, compute)) == [256, 192, 192, 60]
    assert list(Batches(CPU, 100).over(250, compute)) == [100, 100, 50]
    free = 0
    assert list(Batches(CPU, 1000).over(258, compute)) == [256, 1, 1]


def test_a_graphics_card_may_take_more_than_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "free_on", lambda device, processes=1: 1 << 40)
    monkeypatch.setattr(batches, "free_memory", lambda: 1 << 30)

    def compute(start: int, stop: int) -> int:
        return stop - start

    cuda = torch.device("cuda", 0)
    assert list(Batches(cuda, 300).over(100_000, compute)) == [256, 65_536, 34_208]
    # ... as far as the host holds what comes back
    assert list(Batches(cuda, 300, dense=1 << 20).over(1000, compute)) == [256, 512, 232]
    assert list(Batches(cuda, 300, unit=64).over(2000, compute)) == [4, 1024, 972]


def absurd() -> torch.Tensor:
    """Ask for more memory than there is: torch's own error."""
    return torch.empty(1 << 55, dtype=torch.uint8)


def test_where_memory_runs_out_half_is_computed_and_all_cells_come_once() -> None:
    tried = []

    def compute(start: int, stop: int) -> range:
        tried.append(stop - start)
        if stop - start > 40:
            absurd()
        return range(start, stop)

    chosen = Batches(CPU, 100)
    assert [cell for part in chosen.over(230, compute) for cell in part] == list(range(230))
    assert tried == [100, 50, *[25] * 9, 5]
    tried.clear()
    assert sum(map(len, chosen.over(60, compute))) == 60  # it is remembered
    assert tried == [25, 25, 10]


def test_no_memory_for_a_single_cell_is_said_and_other_errors_stay() -> None:
    with pytest.raises(UserError, match="cpu: no memory is left for a single cell"):
        list(Batches(CPU, 8).over(8, lambda start, stop: absurd()))
    with pytest.raises(RuntimeError, match=r"inconsistent|shape"):
        list(Batches(CPU, 8).over(8, lambda start, stop: torch.zeros(2) @ torch.zeros(3)))


def test_a_verb_goes_on_where_memory_runs_out(
    flow: Model, cells: anndata.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, state = flow.generate(300, seed=7), flow.embed(cells).obsm["X_bgen"]
    module, most = flow.saved.module, 64
    sample, encode = module.sample, module.vae.encode

    def scarce(n: int) -> None:
        if n > most:
            absurd()

    def sampled(conditions: Any, n: int, *rest: Any) -> torch.Tensor:
        scarce(n)
        return sample(conditions, n, *rest)

    def encoded(batch: Any) -> Any:
        scarce(len(batch))
        return encode(batch)

    monkeypatch.setattr(module, "sample", sampled)
    monkeypatch.setattr(module.vae, "encode", encoded)
    equal(flow.generate(300, seed=7).X, expected.X)
    equal(flow.embed(cells).obsm["X_bgen"], state)


def test_a_network_is_given_whole_tiles_of_rows() -> None:
    assert len(batches.filled_up(3, 5)) == batches.LEAST
    assert set(batches.filled_up(3, 5)) == {3, 4}
    np.testing.assert_array_equal(batches.filled_up(10, 74), np.arange(10, 74))
    assert len(batches.filled_up(10, 75)) == 3 * batches.LEAST

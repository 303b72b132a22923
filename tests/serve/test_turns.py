"""Questions that wait are answered together where they can be, and each gets the answer that it gets alone."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anndata
import numpy as np
import pytest

from bgen.config.data import TrajectoriesConfig
from bgen.errors import UserError
from bgen.serve import questions
from bgen.serve.questions import Embed, Generate
from bgen.tasks.load import Model, load_model

needs_server = pytest.mark.skipif(
    importlib.util.find_spec("fastapi") is None, reason="not installed: fastapi (extra serve)"
)


@pytest.fixture(scope="module")
def model(demo: Any) -> Model:
    return load_model(demo.model)


@pytest.fixture(scope="module")
def cells(demo: Any) -> anndata.AnnData:
    return anndata.read_h5ad(demo.cells)


def test_cells_of_a_seed_are_the_same_alone_and_together(model: Model) -> None:
    asked = [Generate(n=n, seed=seed) for seed, n in enumerate([1, 2, 40, 7, 2])]
    asked[1].where = {"cell_type": "B"}
    assert len({questions.kind_of_generate(model, each) for each in asked}) == 1
    for each, together in zip(asked, questions.generate_together(model, asked), strict=True):
        alone = questions.generate(model, each)
        assert (together.X != alone.X).nnz == 0
        assert together.obs.equals(alone.obs)
        assert together.uns["bgen"] == alone.uns["bgen"]
    sized = [Generate(n=3, seed=1, library_size=500.0), Generate(n=3, seed=1, library_size=2000.0)]
    few, many = questions.generate_together(model, sized)
    assert many.X.sum() > 2 * few.X.sum()
    assert (many.X != questions.generate(model, sized[1]).X).nnz == 0


def test_what_cannot_go_together_is_of_another_kind(model: Model) -> None:
    kinds = [Generate(), Generate(guidance=2.0), Generate(library_size=500.0)]
    assert len({questions.kind_of_generate(model, each) for each in kinds}) == 3
    own_steps = replace(model.saved, sample=model.saved.sample.model_copy(update={"solver": "adaptive"}))
    assert questions.kind_of_generate(Model(own_steps), Generate()) is None
    of_time = {
        "trajectories": TrajectoriesConfig(times=3, cells=16),
        "roles": {**model.saved.about.roles, "time": "time"},
    }
    about = model.saved.about.model_copy(update=of_time)
    assert questions.kind_of_generate(Model(replace(model.saved, about=about)), Generate()) is None  # drawn whole


def test_latent_states_are_the_same_alone_and_together(model: Model, cells: anndata.AnnData) -> None:
    batch = cells.obs[["batch"]].astype(str)
    parts = [anndata.AnnData(cells.X[a:b], obs=batch[a:b], var=cells.var[[]]) for a, b in ((0, 2), (2, 3), (3, 60))]
    kinds = {questions.kind_of_embed(model, part, Embed()) for part in parts}
    assert len(kinds) == 1
    assert None not in kinds
    together = questions.embed_together(model, [(part, Embed()) for part in parts])
    for part, answer in zip(parts, together, strict=True):
        alone = questions.embed(model, part, Embed())
        np.testing.assert_allclose(answer.obsm["X_bgen"], alone.obsm["X_bgen"], atol=2e-6)
        assert answer.obs.equals(alone.obs)
        assert answer.uns["bgen"] == alone.uns["bgen"]
    first = parts[0]
    other = [Embed(floor=0.5), Embed(gene_column="symbol")]
    assert len({*kinds, *(questions.kind_of_embed(model, first, each) for each in other)}) == 3
    assert questions.kind_of_embed(model, first[:, ::-1].copy(), Embed()) not in kinds
    half = first.copy()
    half.X = half.X * 0.5
    none = first.copy()
    none.X = none.X * 0
    none.X.eliminate_zeros()
    numbers = first.copy()
    numbers.obs["batch"] = [1, 2]
    for odd in (half, none, numbers):
        assert questions.kind_of_embed(model, odd, Embed()) is None


@needs_server
def test_those_that_wait_are_answered_together_and_mistakes_stay_their_own() -> None:
    from bgen.serve.turns import Task, Turns

    begun, go_on = threading.Event(), threading.Event()
    passes: list[list[Any]] = []

    def alone(name: str) -> str:
        if name == "first":
            begun.set()
            assert go_on.wait(300)
        if name == "wrong":
            raise UserError("wrong")
        passes.append([name])
        return name

    def together(names: Sequence[str]) -> list[str]:
        if "wrong" in names:
            raise UserError("of one of them")
        passes.append(list(names))
        return list(names)

    async def there() -> bool:
        return False

    async def away() -> bool:
        return True

    def task(name: str, kind: str | None, cells: int = 1, gone: Any = there) -> Any:
        return Task(lambda: alone(name), lambda told: told, gone, kind, name, together, cells)  # type: ignore

    async def run() -> list[Any]:
        turns = Turns(10)
        first = asyncio.create_task(turns.ask(task("first", "a")))
        await asyncio.to_thread(begun.wait, 300)
        waiting = [
            *(task(f"a{number}", "a", 4) for number in range(3)),  # two of them are as many as go together
            *(task(name, "b") for name in ("b0", "wrong", "b1")),
            *(task(name, None) for name in ("alone", "alone too")),
            task("left", "c", gone=away),
        ]
        asks = [asyncio.create_task(turns.ask(each)) for each in waiting]
        cut = asyncio.create_task(turns.ask(task("cut", "a")))
        await asyncio.sleep(0)
        cut.cancel()
        go_on.set()
        return await asyncio.gather(first, *asks, return_exceptions=True)

    told = asyncio.run(run())
    assert told[:4] == ["first", "a0", "a1", "a2"]
    assert passes == [["first"], ["a0", "a1"], ["a2"], ["b0"], ["b1"], ["alone"], ["alone too"]]
    assert (told[4], str(told[5]), told[6:9]) == ("b0", "wrong", ["b1", "alone", "alone too"])
    assert type(told[9]).__name__ == "ClientDisconnect"

"""Columns of several files are joined as pandas joins them, without an object for a cell."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bgen.order import groups
from bgen.order.keys import hash_keys
from bgen.store.format.columns import describe_column, encode_column, whole_as_text
from data_tools.building.order import shuffled
from data_tools.cells import mapped
from data_tools.cells.columns import Joined, compact, count_texts, whole_as_categories
from data_tools.cells.texts import Texts
from data_tools.check.quantities import read_quantities

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "PART", 64)
    monkeypatch.setattr(mapped, "LEAST", 256)


def _frames() -> list[pd.DataFrame]:
    frames = []
    for number, n in enumerate((150, 90)):
        texts = RNG.choice(["b", "a", "Z"], n)
        frame = pd.DataFrame(
            {
                "text": texts.astype(object),
                "category": pd.Categorical(texts, ["Z", "b", "a"]),
                "other": pd.Categorical(texts, ["b", "Z", "a"] if number else ["a", "b", "Z", "unused"]),
                "gaps": pd.Categorical.from_codes(RNG.integers(-1, 2, n), ["x", "y"]),
                "integers": RNG.integers(0, 9, n).astype(np.int16 if number else np.uint8),
                "numbers": RNG.normal(size=n).astype(np.float32 if number else np.float64),
                "flag": RNG.random(n) < 0.5,
                "mixed": texts if number else RNG.integers(0, 9, n),
                "flag or number": RNG.integers(0, 2, n) if number else RNG.random(n) < 0.5,
                "text or category": pd.Categorical(texts, ["b", "Z", "a"]) if number else texts.astype(object),
                "nullable": pd.array(RNG.integers(0, 9, n), dtype="Int64"),
                f"only {number}": RNG.integers(0, 9, n),
                f"flag only {number}": RNG.random(n) < 0.5,
                f"text only {number}": texts.astype(object),
            },
            index=[f"cell {i}" for i in range(n)],
        )
        frames.append(frame)
    return frames


@pytest.mark.parametrize("files", [1, 2])
def test_columns_are_those_of_pandas(files: int) -> None:
    frames = _frames()[:files]
    keeps = [RNG.random(len(frame)) < 0.8 for frame in frames]
    joined = Joined([compact(frame, Texts()) for frame in frames], keeps, every=True)
    expected = pd.concat(frames).loc[np.concatenate(keeps)] if files > 1 else frames[0].loc[keeps[0]]
    assert joined.columns == list(expected.columns)
    rows = RNG.permutation(len(joined))
    for name in joined.columns:
        found, wanted = encode_column(joined[name]), encode_column(expected[name])
        assert found is not None
        assert wanted is not None
        assert found[0] == wanted[0], name
        assert found[1].dtype == wanted[1].dtype
        assert np.array_equal(found[1], wanted[1], equal_nan=True), name
        described = describe_column(joined[name])
        assert described is not None
        assert np.array_equal(described[1](rows), wanted[1][rows], equal_nan=True)
        ranks = [pd.factorize(values, sort=True)[0].tolist() for values in (joined[name], expected[name])]
        if name != "flag only 1":  # true, false and nothing are not sorted by pandas
            assert ranks[0] == ranks[1], name
        texts = expected[name].astype(str)[expected[name].notna().to_numpy()]
        assert count_texts(joined[name]).to_dict() == texts.value_counts().to_dict()
        assert list(count_texts(joined[name]).index) == list(texts.value_counts().index), name
    common = Joined([compact(frame, Texts()) for frame in frames], keeps)
    assert common.columns == [name for name in frames[0] if all(name in frame for frame in frames)]


def test_categories_are_read_as_their_texts_are() -> None:
    texts = RNG.choice(["day 3", "24h", " 24h", "day 0", "nan", "late"], 200)
    plain = read_quantities(pd.Series(texts.astype(object)), "time")
    found = read_quantities(pd.Series(pd.Categorical(texts)), "time")
    assert list(found.read.items()) == list(plain.read.items())
    assert list(found.wrong.items()) == list(plain.wrong.items())
    assert np.array_equal(found.numbers, plain.numbers, equal_nan=True)
    assert np.array_equal(found.missing, plain.missing)


def test_whole_numbers_are_the_same_texts() -> None:
    values = pd.Series(RNG.integers(0, 30, 200).astype(float))
    assert whole_as_categories(values).tolist() == whole_as_text(values).tolist()
    values[3] = np.nan
    assert whole_as_categories(values).tolist() == whole_as_text(values).tolist()


@pytest.mark.parametrize("populations", [None, 3, 150])
def test_cells_lie_in_the_order_of_a_sort(populations: int | None) -> None:
    split = RNG.integers(0, 3, 900).astype(np.uint8)
    population = None if populations is None else RNG.integers(-1, populations, 900)
    keys = (hash_keys(5, np.arange(900)), *(() if population is None else (population,)), split)
    assert np.array_equal(shuffled(split, population, 5), np.lexsort(keys))


def test_a_median_of_parts_is_that_of_numpy() -> None:
    values = RNG.normal(size=501)
    for n in (501, 500, 3):
        assert mapped.median(n, values.__getitem__) == np.median(values[:n])
        assert np.array_equal(mapped.chosen(values[:n], values[:n] > 0), values[:n][values[:n] > 0])

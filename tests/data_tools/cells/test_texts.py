"""Barcodes in files: what pandas finds of them is found, with little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest

from bgen.order import groups
from data_tools.cells import texts as module
from data_tools.cells.barcodes import Barcodes, texts_of
from data_tools.cells.texts import Texts


def _repeated(names: pd.Index) -> tuple[int, int, list[str]]:
    twice = names[names.duplicated()]
    return len(twice), len(twice.unique()), twice.unique()[:3].tolist()


@pytest.mark.parametrize("collide", [False, True], ids=["hashes differ", "hashes collide"])
def test_repeated_texts_are_those_of_pandas(collide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "PART", 64)
    names = pd.Index([f"b{'é' * (i % 4)}{i % 300}" if i % 7 else f"x{i}" for i in range(600)] + ["", ""])
    texts = Texts()
    for start in range(0, len(names), 100):
        texts.append(names[start : start + 100].to_numpy(object))
    texts.append(np.array(["b0"], object))
    texts.cut(len(names))
    assert [texts[number] for number in range(len(texts))] == names.tolist()
    if collide:  # equal texts must have one hash
        codes = pd.factorize(names)[0].astype(np.uint64) % 3
        monkeypatch.setattr(module, "_hash", lambda data, ends, first, last: codes[first:last] << np.uint64(62))
    for rows in (slice(0, len(names)), slice(100, 450), slice(7, 8)):
        assert texts.repeated(rows) == _repeated(names[rows])


def test_looking_for_repeated_texts_takes_few_bytes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "PART", 4096)
    texts = Texts()
    texts.append(np.array([f"AAACCCAAGAAACACT-{i}" for i in range(60_000)], object))
    texts.repeated(slice(0, 10_000))  # what is compiled takes memory, too
    tracemalloc.start()
    assert texts.repeated(slice(0, len(texts))) == (0, 0, [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(texts)


def test_names_have_the_file_behind() -> None:
    barcodes, endings = texts_of(["a", "left out", "äb", ""]), texts_of(["-1", "-two"])
    names = Barcodes(barcodes, np.array([0, 2, 3]), np.array([0, 1, 1], np.int32), endings)
    assert names.width() == 7
    read = names.read(np.array([2, 0, 1]), 7).view("S7").ravel()
    assert [name.decode() for name in read] == ["-two", "a-1", "äb-two"]

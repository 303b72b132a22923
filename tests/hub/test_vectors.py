"""gene_vectors.safetensors: what is written is read, and a file from anywhere is read or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bgen.genes.vector_map import VectorMap, VectorSource
from bgen.hub.vectors import FILE, read_maps, write_maps


def some_map() -> VectorMap:
    rng = np.random.default_rng(0)
    axes = [rng.standard_normal((rows, 4)).astype(np.float32) for rows in (5, 2)]
    sources = (
        VectorSource("a.csv", None, axes[0], np.ones(4, np.float32)),
        VectorSource("b.gmt", ("S1", "S2"), axes[1], np.zeros(4, np.float32)),
    )
    return VectorMap(sources, ("X", "Y", "Z"), rng.standard_normal((3, 4)).astype(np.float16))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = some_map()
    write_maps({"decoder": made}, tmp_path)
    (half,) = read_maps(tmp_path, {"encoder": 7, "decoder": 4}).items()
    assert half[0] == "decoder"
    assert half[1].others == made.others
    assert np.array_equal(half[1].values, made.values)
    for source, before in zip(half[1].sources, made.sources, strict=True):
        assert (source.name, source.sets) == (before.name, before.sets)
        assert np.array_equal(source.axes, before.axes)
        assert np.array_equal(source.offset, before.offset)


def test_without_maps_there_is_no_file(tmp_path: Path) -> None:
    write_maps({}, tmp_path)
    assert not (tmp_path / FILE).exists()
    assert read_maps(tmp_path, {"decoder": 4}) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, names: tensors.update({"decoder.0.axes": np.ones((5, 3), np.float32)}),
        lambda tensors, names: tensors.update({"decoder.0.axes": np.full((5, 4), np.nan, np.float32)}),
        lambda tensors, names: tensors.update({"decoder.0.axes": np.ones(20, np.float32)}),
        lambda tensors, names: tensors.update({"decoder.1.axes": np.ones((3, 4), np.float32)}),
        lambda tensors, names: tensors.update({"decoder.others": np.ones((2, 4), np.float16)}),
        lambda tensors, names: tensors.update({"decoder.others": np.ones((3, 4), np.float32)}),
        lambda tensors, names: tensors.pop("decoder.1.offset"),
        lambda tensors, names: names["maps"].update(encoder=names["maps"]["decoder"]),
        lambda tensors, names: names["maps"]["decoder"].update(others=7),
        lambda tensors, names: names.clear(),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: Any, tmp_path: Path) -> None:
    write_maps({"decoder": some_map()}, tmp_path)
    tensors = load_file(tmp_path / FILE)
    with safe_open(tmp_path / FILE, framework="np") as file:
        names = json.loads(file.metadata()["bgen"])
    change(tensors, names)
    save_file(tensors, tmp_path / FILE, {"bgen": json.dumps(names)})
    with pytest.raises(Exception, match=r"."):
        read_maps(tmp_path, {"decoder": 4})

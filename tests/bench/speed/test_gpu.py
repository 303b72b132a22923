"""`bgen bench gpu`: the lines that a card is measured with, in small on this CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bgen.bench.speed import gpu, mixers
from bgen.bench.speed.gpu import IN_SMALL, bench_gpu
from bgen.bench.speed.mixers import variants

TINY = replace(IN_SMALL, cells=16, genes=120, sampled=20, read=400, times=(2,))


def few(device: str) -> dict[str, Any]:
    return {"attention": variants(device)["attention"]}


def test_everything_is_measured_and_the_same_as_in_double_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixers, "variants", few)  # which are compared over time points in test_train_step.py
    found = bench_gpu(tmp_path, device="cpu", minutes=60, extent=TINY)
    assert found.agrees
    compared = {row["what"] for row in found.parity}
    every = {"mamba2", "s4d", "hyena", "attention", "mamba1"}
    operators = {"negative binomial", "zero-inflated", "keyed dropout", "thinning", "first layer", "set read"}
    assert compared == operators | every
    single = [row for row in found.parity if row["precision"] == "float32" and row["what"] != "thinning"]
    assert all(0 < row["values"] < 1e-5 for row in single)
    assert [row["stage"] for row in found.steps] == ["vae", "flow", "trajectories", "perturbation"]
    assert all(row["cells_per_s"] > 0 and row["parameters"] > 0 for row in found.steps)
    assert found.steps[2]["cells"] >= 16  # one trajectory is more than was asked for
    assert [row["profile"] for row in found.loading] == ["small", "fast"]
    assert found.loading[0]["cells"] >= TINY.read
    assert found.sampling[0]["cells_per_s"] > 0
    assert found.mixers is not None
    assert found.left_out == []
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert (told["parity"], told["steps"]) == (found.parity, found.steps)
    assert (tmp_path / "gpu.png").stat().st_size > 5000


def test_what_differs_is_told_and_what_fails_stops_nothing(
    tmp_path: Path, bgen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel\nmore")

    def scarce(config: Any, cells: int, *_: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    for module in (gpu, mixers):
        monkeypatch.setattr(module, "variants", few)
    monkeypatch.setattr(gpu, "IN_SMALL", TINY)
    monkeypatch.setattr(gpu, "BOUNDS", {"float32": 1e-12, "bf16": 1.0})
    monkeypatch.setattr(gpu, "time_vae", broken)
    monkeypatch.setattr(gpu, "time_backbone", scarce)
    done = bgen("bench", "gpu", "--device", "cpu", "--out", tmp_path)
    assert done.code == 1, done
    assert "DIFFERS" in done.out
    failed = [row["failed"] for row in json.loads((tmp_path / "gpu.json").read_text())["steps"]]
    assert failed == ["RuntimeError: no such kernel", *3 * ["out of memory with 16 cells"]]
    assert "no such" in done.out


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    found = bench_gpu(tmp_path, device="cpu", minutes=0, extent=TINY)
    assert found.left_out[0] == "parity of likelihoods"
    assert found.left_out[-1] == "mixers"
    assert json.loads((tmp_path / "gpu.json").read_text())["left_out"] == found.left_out


def test_a_card_that_is_not_there(bgen: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = bgen("bench", "gpu", "--out", tmp_path)
    assert (done.code, "There is no CUDA device here" in done.err) == (2, True)

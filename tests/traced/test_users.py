"""What a user does with a model on a GPU, traced for CUDA: cells come from the CPU, and results go back there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from models import SETS, G, along_time, flow, vae
from on_cuda import CUDA, OnCPUError, Trace

from bgen.config.data import TrajectoriesConfig
from bgen.config.flow import SampleConfig
from bgen.distributed import world
from bgen.errors import UserError
from bgen.hub.about import About, Perturbation
from bgen.hub.directory import ColumnInfo, SavedModel
from bgen.tasks.load import Model

N = 40


def cells() -> anndata.AnnData:
    counts = np.random.default_rng(0).poisson(2.0, (N, G)).astype(np.float32)
    labels = {"batch": ["a"] * N, "guide": ["control"] * N, "time": np.repeat([0.0, 2.0], N // 2), "dose": 0.0}
    obs = pd.DataFrame(labels, index=[f"c{i}" for i in range(N)])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(G)]))


def user(module: Any) -> Model:
    """Return a model as it is loaded, made on the CPU."""
    about = About(
        name="test",
        organism="synthetic",
        roles={"time": "time", "batch": "batch"},
        times=[0.0, 1.0, 2.0],
        trajectories=TrajectoriesConfig(times=3, cells=8),
        perturbation=Perturbation(perturbations=["x", "y", "z"], column="guide"),
        control="control",
    )
    return Model(
        SavedModel(
            module=module.eval(),
            genes=pd.DataFrame({"id": [f"g{i}" for i in range(G)], "symbol": [f"s{i}" for i in range(G)], "cells": 1}),
            columns={
                "batch": ColumnInfo("batch", "category", ["a", "b", "c", "d"]),
                "time": ColumnInfo("time", "number", [], 0.0, 1.0),
                "guide": ColumnInfo("perturbation", "category", ["control", "x", "y", "z"]),
                "dose": ColumnInfo("dose", "number", [], 0.0, 1.0),
            },
            combinations=pd.DataFrame({"batch": [0, 1], "time": [0.0, 2.0], "cells": [3, 4]}),
            sample=SampleConfig(steps=2, solver="euler"),
            about=about,
        )
    )


STATIC = lambda: flow({"name": "mlp"})  # noqa: E731

VERBS: dict[str, tuple[Callable[[], Any], Callable[[Model, Any], Any]]] = {
    "generate": (STATIC, lambda model, _: model.generate(7, where={"batch": "a"}, library_size=500.0)),
    "guided": (STATIC, lambda model, _: model.generate(7, guidance=2.0)),
    "encode": (vae, lambda model, data: model.encode(data)),
    "embed": (vae, lambda model, data: model.embed(data, variance=True)),
    "decode": (
        vae,
        lambda model, _: model.decode(np.zeros((3, 4), np.float32), np.ones(3, np.float32), {"batch": ["a"] * 3}),
    ),
    "denoise": (lambda: vae(likelihood="zinb"), lambda model, data: model.denoise(data)),
    "integrate": (vae, lambda model, data: model.integrate(data, batch="batch")),
    "course": (lambda: along_time("mamba2"), lambda model, _: model.generate(9, times=[0.0, 1.0])),
    "interpolate": (lambda: along_time("attention"), lambda model, data: model.interpolate(data, 1.0, n=9)),
    "perturb": (
        lambda: flow({"name": "mlp"}, SETS, source="neighbours"),
        lambda model, data: model.perturb(data, "x", dose=1.0, time=1.0, control="all"),
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_traced(name: str, cuda: None) -> None:
    make, verb = VERBS[name]
    model, trace = user(make()), Trace()
    trace.module(model.saved.module)
    data = cells()
    with trace.verb() as watch:
        assert model.device == CUDA
        made = verb(model, data)
    assert watch.products, "nothing was computed on the device"
    for part in made if isinstance(made, tuple) else (made,):
        assert isinstance(part, anndata.AnnData | np.ndarray)


def test_what_stays_on_the_device_is_refused(cuda: None) -> None:
    trace = Trace()
    x = trace.tensor(torch.ones(3))
    with trace.verb(), pytest.raises(OnCPUError, match="on the device"):
        x.numpy()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda", "without CUDA|no GPU"),
        ("cuda:3", "without CUDA|no GPU"),
        ("mps", "no GPU of Apple"),
        ("gpu", "auto, cpu, cuda, cuda:NUMBER or mps"),
        ("cuda:x", "auto, cpu, cuda, cuda:NUMBER or mps"),
    ],
)
def test_a_device_that_is_not_there_is_said(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        world.device_of(name)


@pytest.mark.parametrize("verb", ["generate", "embed", "annotate", "denoise", "integrate", "perturb", "interpolate"])
def test_every_verb_takes_a_device_and_says_that_it_is_not_there(verb: str, bgen: Any, tmp_path: Path) -> None:
    more = {
        "generate": [],
        "perturb": [tmp_path / "my.h5ad", "--perturbation", "x"],
        "interpolate": [tmp_path / "my.h5ad", "--time", "1"],
    }
    asked = more.get(verb, [tmp_path / "my.h5ad"])
    told = bgen(verb, tmp_path / "model", *asked, "--out", tmp_path / "out.h5ad", "--device", "tpu")
    assert told.code == 2
    assert "There is no device 'tpu': it is auto, cpu, cuda, cuda:NUMBER or mps." in told.err
    assert "Traceback" not in told.err


def test_a_device_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [world.device_of(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [str(world.device_of(name)) for name in ("auto", "cpu", "cuda", "cuda:1")]
    assert found == ["cuda:0", "cpu", "cuda:0", "cuda:1"]
    with pytest.raises(UserError, match="shows 2 GPUs"):
        world.device_of("cuda:2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert str(world.device_of("auto")) == str(world.device_of("cuda")) == "cuda:1"  # this rank's
    monkeypatch.setattr(world, "_on_cpu", False)
    assert world.compute_on("cpu") == world.read_world().device == torch.device("cpu")
    assert world.compute_on("auto") == world.read_world().device

"""What a user does with a model on a GPU, traced for CUDA: cells come from the CPU, and results go back there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from models import SETS, G, along_time, annotator, flow, vae
from on_cuda import CUDA, MPS, OnCPUError, Trace, WideError, on_cuda
from torch._subclasses.fake_tensor import DynamicOutputShapeException, unset_fake_temporarily

from bgen.config.data import TrajectoriesConfig
from bgen.config.flow import LogCountsConfig, SampleConfig
from bgen.distributed import world
from bgen.errors import UserError
from bgen.hub.about import About, Annotation, Perturbation
from bgen.hub.directory import ColumnInfo, SavedModel, load_directory
from bgen.models.annotator import Annotator
from bgen.models.generators.counterfactual import change_counts
from bgen.models.likelihoods.negative_binomial import NegativeBinomial
from bgen.models.log_counts import LogCounts
from bgen.nn.precision import Precision
from bgen.tasks.load import Model

N = 40


def cells() -> anndata.AnnData:
    counts = np.random.default_rng(0).poisson(2.0, (N, G)).astype(np.float32)
    labels = {
        "batch": ["a"] * N,
        "guide": ["control"] * N,
        "time": np.repeat([0.0, 2.0], N // 2),
        "dose": 0.0,
    }
    obs = pd.DataFrame(labels, index=[f"c{i}" for i in range(N)])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(G)]))


def user(module: Any, precision: Precision = "float32") -> Model:
    """Return a model as it is loaded, made on the CPU."""
    about = About(
        name="test",
        organism="synthetic",
        roles={"time": "time", "batch": "batch"},
        times=[0.0, 1.0, 2.0],
        trajectories=TrajectoriesConfig(times=3, cells=8),
        perturbation=Perturbation(perturbations=["x", "y", "z"], column="guide"),
        control="control",
        annotation=Annotation(label="guide", labels=["a", "b", "c"]) if isinstance(module, Annotator) else None,
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
            precision=precision,
        )
    )


def static() -> Any:
    return flow({"name": "mlp"})


def screened() -> Any:
    sets = {name: sizes.model_copy(update={"names": G}) for name, sizes in SETS.items()}
    return flow({"name": "mlp"}, sets, source="neighbours")


def growing() -> Any:
    """A flow that plans its starts over whole populations, with learnt growth."""
    time = {"mixer": "attention", "tokens": 2, "real_time": True}
    made = flow({"name": "hybrid", "time": time}, source="neighbours", coupling={"cells": 16, "growth": True})
    assert made.growth is not None
    return made


VERBS: dict[str, tuple[Callable[[], Any], Callable[[Model, Any], Any]]] = {
    "generate": (static, lambda model, _: model.generate(7, where={"batch": "a"}, library_size=500.0)),
    "many": (static, lambda model, _: model.generate(600)),
    "guided": (static, lambda model, _: model.generate(7, guidance=2.0)),
    "adaptive": (static, lambda model, _: model.generate(7, solver="adaptive")),
    "without a latent space": (
        lambda: flow({"name": "mlp"}, codec=LogCounts(LogCountsConfig(), G)),
        lambda model, _: model.generate(7),
    ),
    "encode": (vae, lambda model, data: model.encode(data)),
    "embed": (vae, lambda model, data: model.embed(data, variance=True)),
    "decode": (
        vae,
        lambda model, _: model.decode(np.zeros((3, 4), np.float32), np.ones(3, np.float32), {"batch": ["a"] * 3}),
    ),
    "denoise": (lambda: vae(likelihood="zinb"), lambda model, data: model.denoise(data)),
    "integrate": (vae, lambda model, data: model.integrate(data, batch="batch")),
    "annotate": (annotator, lambda model, data: model.annotate(data)),
    "course": (lambda: along_time("mamba2"), lambda model, _: model.generate(9, times=[0.0, 1.0])),
    "interpolate": (lambda: along_time("attention"), lambda model, data: model.interpolate(data, 1.0, n=9)),
    "forecast": (lambda: along_time("attention"), lambda model, data: model.forecast(data, 1.0, n=9)),
    "plans between": (growing, lambda model, data: model.interpolate(data, 1.0, n=9)),
    "plans and growth": (growing, lambda model, data: model.forecast(data, 1.0, n=9)),
    "perturb": (screened, lambda model, data: model.perturb(data, "x", dose=1.0, time=1.0, control="all")),
    "perturbations": (
        screened,
        lambda model, data: model.perturb(
            data, pd.DataFrame({"perturbation": ["x", "y"], "dose": 1.0, "time": 1.0}), control="all"
        ),
    ),
}


ATTENDING = ("course", "interpolate", "forecast", "plans between", "plans and growth")
"""Verbs with attention, for which torch's builds for other machines cannot choose a kernel on Apple's GPUs."""

TRACED = [
    *((name, CUDA, precision) for name in VERBS for precision in ("float32", "bf16")),
    *((name, MPS, "bf16") for name in VERBS if name not in ATTENDING),
]


@pytest.mark.parametrize(("name", "device", "precision"), TRACED, ids=lambda part: str(part))
def test_a_verb_is_traced(
    name: str, device: torch.device, precision: Precision, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, verb = VERBS[name]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 34))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1 << 30)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 1 << 20)
    model, trace = user(make(), precision), Trace(device)
    trace.module(model.saved.module)
    data = cells()
    with trace.verb() as watch:
        assert model.device == device
        made = verb(model, data)
    assert watch.products, "nothing was computed on the device"
    assert (torch.bfloat16 in watch.products) == (precision == "bf16" and name != "decode")
    decoded = name not in ("encode", "embed", "without a latent space")
    assert torch.float32 in watch.products or not decoded  # decoders and classifiers stay in float32
    for part in made if isinstance(made, tuple) else (made,):
        assert isinstance(part, anndata.AnnData | np.ndarray)


def _on(trace: Trace, made: NegativeBinomial) -> NegativeBinomial:
    return NegativeBinomial(*(trace.tensor(getattr(made, part.name)) for part in fields(made)))


def test_counts_of_perturbed_cells_need_no_float64_on_apples_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(MPS)
    made = NegativeBinomial(torch.zeros(3, G), torch.ones(3), torch.zeros(G))
    counts, keys = trace.on_host(torch.ones(3, G)), trace.on_host(torch.arange(3))
    with on_cuda(monkeypatch):
        before, after = (_on(trace, made) for _ in range(2))
        # It goes as far as to which counts are thinned, which a trace cannot know.
        with trace.verb(), pytest.raises(DynamicOutputShapeException):
            change_counts(counts, before, after, keys)


def test_float64_on_apples_gpus_is_refused(cuda: None) -> None:
    trace = Trace(MPS)
    x = trace.tensor(torch.ones(3))
    assert x.device == MPS
    with trace.verb(), pytest.raises(WideError, match="float64"):
        x.double()


COMMANDS: dict[str, tuple[Callable[[], Any], list[object]]] = {
    "generate": (static, ["--n", "7"]),
    "embed": (vae, ["CELLS"]),
    "annotate": (annotator, ["CELLS"]),
    "integrate": (vae, ["CELLS", "--batch", "batch"]),
    "interpolate": (lambda: along_time("attention"), ["CELLS", "--time", "1", "--n", "9"]),
    "forecast": (lambda: along_time("attention"), ["CELLS", "--time", "1", "--n", "9"]),
    "perturb": (
        screened,
        ["CELLS", "--perturbation", "x", "--dose", "1", "--time", "1", "--control", "all"],
    ),
}


@pytest.mark.parametrize("device", ["cuda", "auto", "cuda:0", "cpu"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_where_it_is_told(
    name: str, device: str, bgen: Any, cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, asked = COMMANDS[name]
    user(make()).save(tmp_path / "model")
    cells().write_h5ad(tmp_path / "my.h5ad")
    trace, found = Trace(), []

    def load(folder: Path, where: torch.device) -> SavedModel:
        """Read the directory for real, and put what it holds onto the device that was asked for."""
        found.append(where)
        with unset_fake_temporarily():
            saved = load_directory(folder)
        if where.type == "cuda":
            trace.module(saved.module)
        return saved

    monkeypatch.setattr("bgen.tasks.load.load_directory", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    precision = ["--precision", "float32" if device == "cuda:0" else "bf16"]
    asked = [tmp_path / "my.h5ad" if word == "CELLS" else word for word in asked]
    words = [name, tmp_path / "model", *asked, "--out", tmp_path / "out.h5ad", "--device", device, *precision]
    if device == "cpu":
        told = bgen(*words)
    else:
        with trace.verb() as watch:
            told = bgen(*words)
        assert (torch.bfloat16 in watch.products) == ("bf16" in precision)
    assert told.code == 0, told
    assert found == [torch.device("cpu") if device == "cpu" else CUDA]
    assert anndata.read_h5ad(tmp_path / "out.h5ad").n_obs > 0


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

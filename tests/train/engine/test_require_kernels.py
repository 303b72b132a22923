"""What a run needs beside torch is asked for before it starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import ToyStage, toy_config

from bgen.config.backbone import Mamba1Config, Mamba2Config, TimeConfig
from bgen.errors import UserError
from bgen.nn.mixers.mamba1 import Mamba1
from bgen.nn.mixers.mamba2 import Mamba2
from bgen.nn.scans import published_kernels
from bgen.train.engine.kernels import missing_here
from bgen.train.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def mamba2(backend: str) -> Mamba2:
    return Mamba2(16, Mamba2Config.model_validate({"head_width": 8, "state": 4, "backend": backend}), TimeConfig())


def mamba1(backend: str) -> Mamba1:
    return Mamba1(16, Mamba1Config.model_validate({"state": 4, "backend": backend}), TimeConfig())


def test_each_missing_kernel_is_told_once_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_kernels, "missing", lambda mixer: "No module named 'einops'")
    model = nn.ModuleList([mamba2("auto"), mamba2("auto"), mamba1("auto"), nn.Linear(2, 2)])
    first, second = missing_here(model, CUDA, compiling=False)
    assert first.startswith("mamba2 on cuda needs the kernels of mamba-ssm (No module named 'einops')")
    assert "MAMBA_SKIP_CUDA_BUILD=TRUE" in first
    assert "flow.backbone.mamba2.backend=torch" in first
    assert second.startswith("mamba1 on cuda")
    assert missing_here(model, CPU, compiling=False) == []
    assert missing_here(nn.ModuleList([mamba2("torch"), mamba1("torch")]), CUDA, compiling=False) == []
    monkeypatch.setattr(published_kernels, "missing", lambda mixer: None)
    assert missing_here(model, CUDA, compiling=False) == []


def test_kernels_that_are_installed_do_not_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_kernels, "missing", lambda mixer: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (problem,) = missing_here(mamba2("fused"), CPU, compiling=False)
    assert "flow.backbone.mamba2.backend=fused computes on CUDA only, and this is cpu: set it to auto" in problem
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert missing_here(mamba2("fused"), CPU, compiling=False) == []


def test_compiled_blocks_need_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    (problem,) = missing_here(nn.Linear(2, 2), CUDA, compiling=True)
    assert 'pip install "triton' in problem
    assert "train.compile=false" in problem
    assert missing_here(nn.Linear(2, 2), CPU, compiling=True) == []
    assert missing_here(nn.Linear(2, 2), CUDA, compiling=False) == []


def test_a_run_without_its_kernels_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_kernels, "missing", lambda mixer: f"no {mixer}")
    config = toy_config(tmp_path / "run")
    stage = ToyStage(config)
    stage.module.mixer = mamba2("fused")
    with pytest.raises(UserError, match="needs the kernels of mamba-ssm"):
        Trainer(config, stage)
    assert not (tmp_path / "run").exists()

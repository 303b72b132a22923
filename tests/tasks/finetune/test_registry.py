"""A task of fine-tuning is one file and one line in the registry: here one is added from outside, and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

import bgen
from bgen.errors import UserError
from bgen.hub.about import About
from bgen.hub.directory import SavedModel
from bgen.models.vae.vae import VAE
from bgen.tasks.finetune.registry import TASKS
from bgen.tasks.finetune.request import Request
from bgen.tasks.finetune.task import Job, Task

QUICK = ["train.steps=4", "train.eval_every=2", "train.global_batch=64", "track.progress=false", "track.mlflow=false"]


class Adapt(Task[str]):
    """Only the autoencoder, adapted; prepared is a word from the label."""

    def require(self, request: Request) -> None:
        super().require(request)
        if request.label is None:
            raise UserError("--task adapt needs --label.")

    def prepare(self, grown: SavedModel, adata: anndata.AnnData, request: Request) -> str:
        return f"{request.label} of {adata.n_obs} cells"

    def train(self, job: Job, prepared: str) -> tuple[VAE, About]:
        assert len(job.cells) == len(job.memory) == sum(map(len, job.watched))
        return job.grown.vae, job.about.model_copy(update={"sources": [prepared]})


def test_a_task_from_outside_is_fine_tuned_for(
    request: pytest.FixtureRequest, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bgen_run = request.getfixturevalue("bgen")
    asked = ["finetune", demo.model, demo.cells, "--task", "adapt", "--out", tmp_path / "out", *QUICK]
    unknown = bgen_run(*asked)
    assert (unknown.code, "generate, annotate, perturb, time and" in unknown.err) == (2, True)

    monkeypatch.setitem(TASKS, "adapt", Adapt())
    assert "--task adapt needs --label" in bgen_run(*asked).err
    network = bgen_run(*asked, "--label", "x", "--network", tmp_path / "edges.csv")
    assert "not of --task adapt" in network.err
    done = bgen_run(*asked, "--label", "cell_type")
    assert done.code == 0, done
    model, parent = bgen.load(tmp_path / "out" / "model"), bgen.load(demo.model)
    about = model.saved.about
    assert about.finetuning is not None
    assert (model.saved.kind, about.finetuning.task) == ("vae", "adapt")
    assert about.sources == ["cell_type of 600 cells"]
    cells = anndata.read_h5ad(demo.cells)
    assert not np.array_equal(model.encode(cells)[0], parent.encode(cells)[0])

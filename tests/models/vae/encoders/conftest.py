"""What the tests of encoders share: a short training, and fine-tuning on cells with new genes and a new batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import pytest

from bgen.hub.directory import load_directory
from bgen.models.vae.vae import VAE

QUICK = ["train.steps=12", "train.global_batch=96", "train.eval_every=6", "train.warmup=2", "train.log_every=4"]
QUICK += ["track.mlflow=false", "track.progress=false"]

Tune = Callable[[Path, str], tuple[VAE, VAE]]


@pytest.fixture
def tune_with_new_genes(bgen: Any, demo: Any, tmp_path: Path) -> Tune:
    """Fine-tune a run's model in a mode on cells with six genes more and a new batch; the VAE before and after."""

    def tune(run: Path, mode: str) -> tuple[VAE, VAE]:
        new = anndata.read_h5ad(demo.cells)[:120].copy()
        new.var_names = [*new.var_names[:114], *[f"NEW{number}" for number in range(6)]]
        new.obs["batch"] = "batch_new"
        new.write_h5ad(tmp_path / "new.h5ad")
        asked = ["--task", "annotate", "--label", "cell_type", "--mode", mode, "--add-genes", "--out", tmp_path / "out"]
        done = bgen("finetune", run / "model", tmp_path / "new.h5ad", *asked, *QUICK)
        assert done.code == 0, done
        old, grown = (load_directory(folder / "model").vae for folder in (run, tmp_path / "out"))
        assert grown.n_genes == 126
        return old, grown

    return tune

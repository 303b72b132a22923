"""What benchmarks train on and how: a store of some cells, as `bgen data build` makes it, and trainings to the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anndata import AnnData

from bgen.config.load import load_config
from bgen.config.run import RunConfig
from bgen.errors import UserError
from bgen.files import write_h5ad
from bgen.train.run import train
from bgen.train.stages.stage import Stage
from bgen.train.trainer import Trainer, TrainResult
from bgen.version import __version__
from data_tools.building.build import build
from data_tools.check.check import check


def store_of(cells: AnnData, folder: Path, seed: int) -> Path:
    """Write cells (raw counts in X) into a store in a new folder, nine tenths to train on; return its path.

    Raises
    ------
    UserError
        If the cells cannot be used.
    """
    folder.mkdir(parents=True)
    write_h5ad(cells, folder / "cells.h5ad")
    report = check([folder / "cells.h5ad"])
    if report.errors:
        raise UserError(f"The cells cannot be used: `bgen data check {folder / 'cells.h5ad'}` says why.")
    store = folder / "store"
    build(report, store, created_by=f"bgen {__version__}", splits={"train": 0.9, "valid": 0.1}, seed=seed)
    return store


def train_whole(name: str, overrides: Sequence[str]) -> None:
    """Train the configuration ``name`` with ``overrides``, and export the model to ``out/model``.

    Raises
    ------
    UserError
        If the settings do not fit, or a signal stopped the training, since half a training is no comparison.
    """
    _require_whole(train(load_config(name, overrides)))


def fit_whole(config: RunConfig, stage: Stage) -> None:
    """Train a stage; afterwards its module has the weights to keep.

    Raises
    ------
    UserError
        As :func:`train_whole`.
    """
    _require_whole(Trainer(config, stage).fit())


def _require_whole(done: TrainResult) -> None:
    if done.interrupted:
        raise UserError(f"Stopped by a signal at step {done.step}; nothing was measured.")

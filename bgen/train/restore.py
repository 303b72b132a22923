"""Going on from a checkpoint: which one, whether it fits, and reading it at any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from bgen.checkpoint import files, shards
from bgen.checkpoint.commit import Checkpoints
from bgen.checkpoint.shards import Shards
from bgen.config.train import TrainConfig
from bgen.distributed import world as ranks
from bgen.errors import UserError
from bgen.train.engine.engine import Engine
from bgen.train.state import RunState


def find(checkpoints: Checkpoints) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint and a line for each damaged one; None if the run has no checkpoint yet.

    Raises
    ------
    UserError
        If all checkpoints are damaged.
    """
    folder, damaged = checkpoints.newest()
    if folder is None and damaged:
        raise UserError(
            f"No checkpoint in {checkpoints.root} is usable: {'; '.join(damaged)}. Restore one from a backup, or start "
            "anew with another out=."
        )
    return folder, [f"{line}: going on from {folder.name} instead" for line in damaged if folder is not None]


def read_state(folder: Path, fingerprint: dict[str, Any], force: bool) -> tuple[RunState, list[str]]:
    """Return the state in a checkpoint, and a line if its data differ from ``fingerprint`` and ``force`` allows that.

    Raises
    ------
    UserError
        If the data differ and ``force`` is False.
    """
    saved = json.loads((folder / files.STATE).read_text(encoding="utf-8"))
    then, now = saved["fingerprint"], json.loads(json.dumps(fingerprint))
    changed = [name for name in sorted(set(now) | set(then)) if now.get(name) != then.get(name)]
    if changed and force:
        names = ", ".join(changed)
        return RunState.from_json(saved["state"]), [f"going on with other data than before: {names} changed"]
    if changed:
        lines = "\n".join(f"  {name}: was {then.get(name)}, is {now.get(name)}" for name in changed)
        raise UserError(
            f"{folder} was made with other data, so the run cannot go on:\n{lines}\n"
            "Give it the data that it began with (data.store; what is fine-tuned, on which cells, for what), start a "
            "new run with another out=, or, if you mean to go on with this data, give `bgen train` "
            "--accept-changed-data."
        )
    return RunState.from_json(saved["state"]), []


def load_engine(folder: Path, module: nn.Module, config: TrainConfig, out: Path) -> tuple[Engine, Shards, list[str]]:
    """Return an engine with the weights and optimiser of a checkpoint, the checkpoint, and a line if its layout
    differed.

    Raises
    ------
    UserError
        If the checkpoint was written by another version of bgen, with another optimiser, or of another model.
    """
    world = ranks.current()
    manifest = files.read_manifest(folder)
    if manifest["optimizer"] != config.optimizer:
        raise UserError(
            f"{folder} was written with train.optimizer={manifest['optimizer']}, whose state {config.optimizer} cannot "
            f"use: set train.optimizer={manifest['optimizer']}, or start a new run."
        )
    saved = Shards(folder)
    _check_model(folder, saved, module)
    engine = Engine(module, config, world, out, saved)
    then, now = (manifest["ranks"], manifest["zero"]), (world.size, config.zero)
    if then == now:
        return engine, saved, []
    return engine, saved, [f"{folder.name}: converted from {_layout(*then)} to {_layout(*now)}"]


def _check_model(folder: Path, saved: Shards, module: nn.Module) -> None:
    there = {name: saved.shapes[name] for name in saved.names(shards.WEIGHT)}
    here = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    other = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if other:
        shown = "\n".join(f"  {name}: there {there.get(name)}, here {here.get(name)}" for name in other[:5])
        raise UserError(
            f"{folder} holds another model than this run's ({len(other)} parameters differ):\n{shown}\n"
            "Give the run the settings of the model that it began with. If they are the same, an earlier bgen made it: "
            "finish the run with that one, or start a new run with another out=."
        )


def _layout(world_size: int, zero: int) -> str:
    return f"{world_size} rank{'s' * (world_size > 1)} at ZeRO {zero}"

"""Going on from a checkpoint: which one, whether it fits, and reading it at whatever number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from bgen.checkpoint import files
from bgen.checkpoint.commit import Checkpoints
from bgen.config.errors import UserError
from bgen.config.schema import TrainConfig
from bgen.distributed import world as ranks
from bgen.train.engine import Engine, convert, needs_conversion
from bgen.train.state import RunState


def find(checkpoints: Checkpoints) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint and a line for each damaged one; None if the run has none yet.

    Raises
    ------
    UserError
        If there are some and all are damaged.
    """
    folder, damaged = checkpoints.newest()
    if folder is None and damaged:
        raise UserError(
            f"No checkpoint in {checkpoints.root} is usable: {'; '.join(damaged)}. Restore one from a backup, or start "
            "anew with another out=."
        )
    return folder, [f"{line}: going on from {folder.name} instead" for line in damaged if folder is not None]


def read_state(folder: Path, fingerprint: dict[str, Any]) -> RunState:
    """The state in a checkpoint.

    Raises
    ------
    UserError
        If it was made with other data than ``fingerprint`` says.
    """
    saved = json.loads((folder / files.STATE).read_text(encoding="utf-8"))
    then, now = saved["fingerprint"], json.loads(json.dumps(fingerprint))
    changed = [name for name in sorted(set(now) | set(then)) if now.get(name) != then.get(name)]
    if changed:
        lines = "\n".join(f"  {name}: was {then.get(name)}, is {now.get(name)}" for name in changed)
        raise UserError(
            f"{folder} was made with other data, so the run cannot go on:\n{lines}\n"
            "Point data.store at the store it began with, or start a new run with another out=."
        )
    return RunState.from_json(saved["state"])


def load_engine(folder: Path, module: nn.Module, config: TrainConfig) -> tuple[Engine, list[str]]:
    """An engine with the weights and optimiser of a checkpoint, and a line if that took a conversion.

    Raises
    ------
    UserError
        If the checkpoint's ZeRO stage cannot be read at the configured one.
    """
    world = ranks.current()
    manifest = files.read_manifest(folder)
    zero, saved_ranks = manifest["zero"], manifest["ranks"]
    if (zero > 0) != (config.zero > 0):
        raise UserError(
            f"{folder} was written with train.zero={zero}, and a run cannot change to or from 0 when it resumes: "
            f"set train.zero={zero}."
        )
    conversion = needs_conversion(zero, saved_ranks, world.size)
    engine = Engine(module, config, world, universal=conversion)
    if not conversion:
        engine.load(folder)
        return engine, []
    target = folder.with_name(f"{folder.name}.converted.tmp")
    failure = ""
    if world.is_main:
        try:
            convert(folder, target)
        except (OSError, RuntimeError) as error:
            failure = str(error)
    failure = ranks.from_main(failure)
    if failure:
        raise UserError(f"{failure}\nResume with {saved_ranks} ranks, which needs no conversion.")
    engine.load(target)
    return engine, [f"{folder.name}: converted from {saved_ranks} to {world.size} ranks"]

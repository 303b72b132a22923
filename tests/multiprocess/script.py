"""What the tests start with torchrun, deepspeed or python: ``script.py SCENARIO FOLDER [--local_rank=N]``.

Each rank writes what it saw to ``FOLDER/result_RANK.json``; some scenarios leave their run in ``FOLDER`` as well.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import torch
from torch import Tensor
from toy import ToyModel, ToyStage, run, toy_config

from bgen.checkpoint import commit
from bgen.config.run import Config
from bgen.data.batch import CellBatch
from bgen.distributed import world as ranks
from bgen.distributed.report import report_user_error
from bgen.errors import UserError
from bgen.track import record
from bgen.train.trainer import Trainer

AVERAGED = {"ema": 0.9, "patience": 20, "eval_every": 5}
SHORT = {"steps": 20, "checkpoint_every": 10, "norms": 10}
HOP = 5
"""Steps that a run makes on a number of ranks before it goes on with another."""


def two_ranks(folder: Path) -> dict[str, Any]:
    """Straight, interrupted and resumed, resumed from one rank, and poisoned: for the ZeRO stages that are there."""
    found: dict[str, Any] = {}
    rank = int(os.environ["RANK"])
    for zero in (zero for zero in range(4) if (folder / f"one_rank_{zero}").exists()):
        straight, _ = run(toy_config(folder / f"straight_{zero}", SHORT | {"zero": zero, **AVERAGED}))
        found[f"straight_{zero}"] = straight.losses
        halves = toy_config(folder / f"halves_{zero}", SHORT | {"zero": zero, **AVERAGED, "micro_batch": 2})
        # One rank alone is asked to stop.
        first, _ = run(halves, stop_after=10 if rank == 1 else 0)
        second, stage = run(halves, resume=True)
        found[f"halves_{zero}"] = first.losses + second.losses
        found[f"interrupted_{zero}"] = first.interrupted, first.step
        found[f"weights_{zero}"] = [float(w.double().sum()) for w in stage.module.state_dict().values()]
        resumed, _ = run(toy_config(folder / f"one_rank_{zero}", SHORT | {"zero": zero}), resume=True)
        # Saving after a conversion, and resuming from that.
        again, _ = run(toy_config(folder / f"one_rank_{zero}", SHORT | {"zero": zero, "steps": 25}), resume=True)
        found[f"from_one_rank_{zero}"] = resumed.losses + again.losses
        found[f"poisoned_{zero}"] = poisoned(folder / f"poisoned_{zero}", zero)
    found["chosen"] = chosen(folder / "chosen", room=4 if rank == 0 else 2)
    return found


def chosen(folder: Path, room: int) -> dict[str, Any]:
    """A micro batch that is chosen where this rank's memory has room for so many cells."""
    stage = ToyStage(toy_config(folder, {"steps": 3, "eval_every": 0, "zero": 1, "micro_batch": "auto"}))

    def takes_memory(_: torch.nn.Module, args: Any) -> None:
        if len(args[0]) > room:
            torch.empty(1 << 60, dtype=torch.uint8)

    stage.module.register_forward_pre_hook(takes_memory)
    result = Trainer(stage.config, stage).fit()
    return {"losses": result.losses, "cells": stage.config.train.micro_batch}


def resharded(folder: Path) -> dict[str, Any]:
    """Go on with the runs that are there, each at the next ZeRO stage."""
    found = {}
    for first in (first for first in range(4) if (folder / f"run_{first}").exists()):
        size = ranks.read_world().size
        config = resharding_config(folder, first, hops=size - 1)
        result, _ = run(config, resume=True)
        found[str(first)] = result.losses
    return found


def resharding_config(folder: Path, first: int, hops: int) -> Config:
    """Settings of a run that began at ZeRO stage ``first`` and was moved on ``hops`` times."""
    settings = AVERAGED | {"zero": (first + hops) % 4, "steps": HOP * (hops + 1), "global_batch": 12, "micro_batch": 2}
    raw = folder / "partition_everything.json"
    if not raw.exists():
        raw.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    return toy_config(folder / f"run_{first}", settings | ({"deepspeed": raw} if settings["zero"] == 3 else {}))


def poisoned(folder: Path, zero: int) -> dict[str, Any]:
    """Rank 1 alone meets a loss that is not finite (step 3) and a gradient that is not (step 5)."""
    stage = ToyStage(toy_config(folder, {"zero": zero, "steps": 10}))
    assert isinstance(stage.module, ToyModel)
    scale = stage.module.body[0].weight

    def poison(batch: CellBatch) -> Tensor | None:
        if ranks.current().rank != 1:
            return None
        if batch.step == 3:
            return torch.where(batch.cells == batch.cells[0], torch.inf, 0.0)
        # The square root of zero is finite; its slope is not.
        return torch.sqrt((scale - scale.detach()).abs().sum()) if batch.step == 5 else None

    stage.module.poison = poison
    rank = ranks.current().rank
    stage.module.register_buffer("given", torch.full((2, 3), float(rank)))
    stage.module.register_buffer("told", torch.tensor(rank == 1))
    result = Trainer(stage.config, stage).fit()
    state = stage.module.state_dict()
    finite = all(bool(w.isfinite().all()) for w in state.values())
    losses = [loss if loss == loss else None for loss in result.losses]
    return {"losses": losses, "finite": finite, "given": state["given"].tolist(), "told": state["told"].tolist()}


def reduced(folder: Path) -> dict[str, Any]:
    """Losses of runs whose gradients travel in float32 and in bfloat16, at every ZeRO stage."""
    found = {}
    for zero, sent, precision in [(z, s, "float32") for z in range(4) for s in ("float32", "bf16")] + [
        (1, "float32", "bf16"),
        (1, "bf16", "bf16"),
    ]:
        settings = {"steps": 20, "zero": zero, "reduce_precision": sent, "comms_log": True, "micro_batch": 2}
        settings["precision"] = precision
        found[f"{zero}_{sent}_{precision}"] = run(toy_config(folder / f"{zero}_{sent}_{precision}", settings))[0].losses
    return found


def told(folder: Path) -> dict[str, Any]:
    """Bytes of each collective in a step of two micro batches, by ZeRO stage, and of the weights; seconds, too."""
    raw = folder / "partition_everything.json"
    found: dict[str, Any] = {}
    for zero in range(4):
        seen = []
        for steps in (2, 6):
            settings = {"steps": steps, "zero": zero, "micro_batch": 2, "comms_log": True, "eval_every": 0}
            out = folder / f"{zero}_{steps}"
            stage = ToyStage(toy_config(out, settings | ({"deepspeed": raw} if zero == 3 else {})))
            width = int(os.environ.get("TOLD_WIDTH", "1024"))
            body = [torch.nn.Linear(8, width), torch.nn.Linear(width, width), torch.nn.Linear(width, 1)]
            stage.module.body = torch.nn.Sequential(*body)
            found["weights"] = 4 * sum(p.numel() for p in stage.module.parameters())
            Trainer(stage.config, stage).fit()
            rows = record.read(out / "record.jsonl")
            seen.append(next(row for row in rows if row.get("event") == "communication"))
        first, second = ({k: v for k, v in row.items() if isinstance(v, dict)} for row in seen)
        # What a process has sent is added up over its runs: the second has what the first had, and more.
        before = found.setdefault("_all", {})
        of = {}
        for kind, figures in second.items():
            nothing = {"bytes": 0, "ms": 0.0, "calls": 0}
            one = {k: first.get(kind, nothing)[k] - before.get(kind, nothing)[k] for k in nothing}
            two = {k: figures[k] - first.get(kind, nothing)[k] for k in nothing}
            of[kind] = {k: (two[k] - one[k]) / 4 for k in nothing}
        found["_all"] = second
        found[str(zero)] = of
    del found["_all"]
    return found


def plain(folder: Path) -> dict[str, Any]:
    """A short run."""
    result, _ = run(toy_config(folder / "run", {"steps": 5, "zero": 1}))
    slow = ("deepspeed", "mlflow", "scipy.stats", "torch._inductor.compile_fx")
    imported = [name for name in slow if name in sys.modules]
    return {"losses": result.losses, "threads": torch.get_num_threads(), "imported": imported}


def impossible(folder: Path) -> dict[str, Any]:
    """A global batch that two ranks cannot share; the model must not be reached."""
    config = toy_config(folder / "run", {"global_batch": 9})
    ToyStage(config)
    return {}


def endless(folder: Path) -> dict[str, Any]:
    """Runs until it is asked to stop."""
    result, _ = run(toy_config(folder / "run", {"steps": 1_000_000, "checkpoint_every": 1_000_000}))
    return {"interrupted": result.interrupted, "step": result.step}


def tune(folder: Path, out: Path, zero: int) -> None:
    """Fine-tune the models in ``folder`` on its cells, for every task in every mode, each into a folder in ``out``."""
    from bgen.tasks.finetune.finetune import Request, finetune
    from bgen.tasks.perturb.screen import Columns

    raw = folder / "partition_everything.json"
    raw.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    cells = anndata.read_h5ad(folder / "cells.h5ad")
    settings = ["train.steps=10", "train.eval_every=5", "train.global_batch=192", "train.log_every=1"]
    settings += ["track.progress=false", f"train.zero={zero}", *([f"train.deepspeed={raw}"] if zero == 3 else [])]
    for mode in ("full", "lora", "head"):
        over_time = Request("time", mode, time="time", system=["donor"])
        for name, parent, request in (
            ("generate", "model", Request("generate", mode)),
            ("annotate", "model", Request("annotate", mode, label="cell_type")),
            ("perturb", "model", Request("perturb", mode, columns=Columns("perturbation", "control"))),
            ("time", "model", over_time),
            ("course", "course", over_time),  # a parent with a flow over time
        ):
            finetune(folder / parent, cells, out / f"{name}_{mode}", request, overrides=settings, say=lambda _: None)


def tuned(folder: Path) -> dict[str, Any]:
    """Every kind of fine-tuning, at ZeRO 1 and 3."""
    for zero in (1, 3):
        tune(folder, folder / f"two_{zero}", zero)
    return {}


def killed_while_saving(folder: Path) -> dict[str, Any]:
    """Dies of SIGKILL in the second checkpoint, when every file is written and none is committed."""
    hashed = commit.files.sha256

    def killing(path: Path) -> str:
        if "step_00000020.tmp" in str(path) and path.name == "state.json":
            os.kill(os.getpid(), signal.SIGKILL)
        return hashed(path)

    commit.files.sha256 = killing
    run(toy_config(folder / "run", {"steps": 30, "checkpoint_every": 10}))
    raise AssertionError("not killed")


def killed_while_embedding(folder: Path) -> dict[str, Any]:
    """Rank 1 dies of SIGKILL when its first block is written and not told; rank 0 is ended by the launcher."""
    # here, since another scenario looks at what a training imports
    from bgen.tasks.blocks import run as blocks
    from bgen.tasks.blocks.verbs import embed_in_blocks
    from bgen.tasks.load import load_model

    committed = blocks.commit

    def killing(path: Path, data: bytes) -> None:
        if os.environ["RANK"] == "1" and path.parent.name == "done":
            while not path.with_name("0.json").exists():  # rank 0 has done a block
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        committed(path, data)

    blocks.commit = killing
    embed_in_blocks(load_model(folder / "model"), folder / "store", folder / "out.zarr", {})
    raise AssertionError("not killed")


def main() -> int:
    """Run the scenario; 2 on a user's mistake, as the command line does."""
    # The deepspeed launcher puts --local_rank=N before the script's own arguments.
    scenario, folder = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    try:
        result = globals()[scenario](Path(folder))
    except UserError as error:
        return report_user_error(error)
    (Path(folder) / f"result_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
    ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

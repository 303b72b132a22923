"""What the fault tests start, with or without a launcher: ``scenarios.py SCENARIO FOLDER [--local_rank=N]``.

Every scenario resumes if there is something to resume from, as a job that may be restarted does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from toy import ToyStage, toy_config

from bgen.checkpoint import ownership, shards
from bgen.data.batch import CellBatch
from bgen.distributed import world as ranks
from bgen.distributed.report import report_user_error
from bgen.errors import UserError
from bgen.train import watch
from bgen.train.trainer import Trainer, TrainResult

SETTINGS: dict[str, Any] = {"steps": 30, "checkpoint_every": 5, "zero": 1, "ema": 0.9, "step_timeout": 60}


def once(folder: Path, name: str) -> bool:
    """True the first time that any process asks for ``name``."""
    try:
        (folder / f"once_{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def train(
    folder: Path,
    settings: dict[str, Any],
    at_step: Callable[[int], None],
    finish: Callable[[nn.Module], None] | None = None,
) -> TrainResult:
    """Train with resume, calling ``at_step`` before each step's batches are drawn, and ``finish`` at the end."""
    stage = ToyStage(toy_config(folder / "run", SETTINGS | settings))
    drawn = stage.train_batches

    def batches(start: int) -> Iterator[Sequence[CellBatch]]:
        for step, found in enumerate(drawn(start), start):
            at_step(step)
            yield found

    stage.train_batches = batches  # type: ignore[method-assign]
    if finish is not None:
        stage.finish = finish  # type: ignore[method-assign]
    return Trainer(stage.config, stage).fit(resume=True)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_twice(folder: Path) -> TrainResult:
    """Rank 1 dies in step 12, and after the restart again, while it writes the checkpoint of step 20."""
    written = shards.write

    def dying(path: Path, *arguments: Any) -> dict[str, Any]:
        if "step_00000020.tmp" in str(path) and ranks.current().rank == 1 and once(folder, "save"):
            path.write_bytes(b"half")
            die()
        return written(path, *arguments)

    shards.write = dying

    def at_step(step: int) -> None:
        if step == 12 and ranks.current().rank == 1 and once(folder, "step"):
            die()

    return train(folder, {}, at_step)


def slow_then_hung(folder: Path) -> TrainResult:
    """Rank 1 is slow from the start, and stops altogether in step 10."""

    def at_step(step: int) -> None:
        if ranks.current().rank == 1:
            time.sleep(1000 if step == 10 else 0.05)

    return train(folder, {"report_every": 5, "step_timeout": 5, "checkpoint_every": 100}, at_step)


def slow_disk(folder: Path) -> TrainResult:
    """On rank 0 a checkpoint, the record's fsync and the stage's last work each take longer than a step may."""
    written, synchronised = shards.write, os.fsync
    main = os.environ["RANK"] == "0"
    watch.GRACE = 0.5

    def pause(name: str) -> None:
        if main and once(folder, name):
            time.sleep(3.6)  # more than what a step may take and the grace together

    def write(path: Path, *arguments: Any) -> dict[str, Any]:
        pause("shards")
        return written(path, *arguments)

    def fsync(descriptor: int) -> None:
        if "record.jsonl" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            pause("record")
        synchronised(descriptor)

    shards.write, os.fsync = write, fsync
    settings = {"steps": 8, "checkpoint_every": 4, "step_timeout": 3}
    return train(folder, settings, lambda step: None, finish=lambda module: pause("finish"))


def own_disk(folder: Path) -> TrainResult:
    """Every rank has a run folder of its own."""
    ownership.SHARING = 0.5
    return train(folder / f"node_{os.environ['RANK']}", {}, lambda step: None)


def away(folder: Path) -> TrainResult:
    """The data of rank 1 cannot be read any more from step 25 on, and nobody loses patience."""
    stage = ToyStage(toy_config(folder / "run", SETTINGS | {"steps": 10**6, "checkpoint_every": 10**6}))
    drawn = stage.train_batches

    def batches(start: int) -> Iterator[Sequence[CellBatch]]:
        for step, found in enumerate(drawn(start), start):
            if step == 25 and ranks.current().rank == 1:
                (folder / "away").touch()
                raise OSError(116, "Stale file handle")
            yield found

    stage.train_batches = batches  # type: ignore[method-assign]
    return Trainer(stage.config, stage).fit(resume=True)


def endless(folder: Path) -> TrainResult:
    """Runs until it is asked to stop; then it exits with the code for requeue."""
    return train(folder, {"steps": 10**6, "checkpoint_every": 10**6, "requeue_exit": 99}, lambda step: None)


def slow_save(folder: Path) -> TrainResult:
    """Like endless, but every save takes 40 s: longer than launchers wait by default."""
    written = shards.write

    def slow(*arguments: Any) -> dict[str, Any]:
        time.sleep(40)
        return written(*arguments)

    shards.write = slow
    return endless(folder)


def plain(folder: Path) -> TrainResult:
    """Nothing happens."""
    return train(folder, {"steps": 10}, lambda step: None)


def lost_node(folder: Path) -> TrainResult:
    """Waits in the middle for a host to be cut off, in each step half as long as a step may take."""

    def at_step(step: int) -> None:
        deadline = time.monotonic() + 4
        while step > 40 and not (folder / "cut").exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    return train(folder, {"steps": 100, "checkpoint_every": 5, "step_timeout": 8}, at_step)


def goodput(folder: Path) -> TrainResult:
    """300 steps; in each of the first five lives some rank dies at a random moment."""
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    once(folder, f"life_{life}")
    moments = random.Random(life)
    victim, delay = moments.randrange(int(os.environ["WORLD_SIZE"])), moments.uniform(0.3, 1.2)

    def at_step(step: int) -> None:
        time.sleep(0.02)
        if os.environ["RANK"] == "0":
            with (folder / "drawn").open("a") as drawn:
                drawn.write(f"{step}\n")
        # The first step takes as long as the machine is busy: the time counts from there.
        if life < 5 and int(os.environ["RANK"]) == victim and not timer:
            timer.append(threading.Timer(delay, die))
            timer[0].daemon = True
            timer[0].start()

    timer: list[threading.Timer] = []
    return train(folder, {"steps": 300, "checkpoint_every": 5}, at_step)


def undisturbed(folder: Path) -> TrainResult:
    """The same without deaths."""
    return train(folder, {"steps": 300, "checkpoint_every": 5}, lambda step: None)


def main() -> int:
    """Run the scenario; exit as the command line does."""
    scenario, folder = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    try:
        result = globals()[scenario](Path(folder))
    except UserError as error:
        return report_user_error(error)
    seen = {"losses": result.losses, "step": result.step, "interrupted": result.interrupted}
    (Path(folder) / f"result_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
    ranks.stop()
    return 99 if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())

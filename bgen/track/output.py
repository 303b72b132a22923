"""Everything that a run writes about itself: the record, its MLflow mirror, and what is shown on the terminal.

Only rank 0 writes; on the other ranks every call does nothing.
"""

from __future__ import annotations

import importlib.util
import json
import math
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from bgen.config.load import to_yaml
from bgen.config.run import Config, RunConfig
from bgen.distributed.world import World
from bgen.errors import UserError
from bgen.passwords import without_passwords
from bgen.track import record as records
from bgen.track.environment import environment
from bgen.track.mirror import Mirror
from bgen.track.mlflow import flatten, tracking_uri
from bgen.track.progress import ProgressLine
from bgen.track.target import Kind, Target

RECORD = "record.jsonl"
CONFIG = "config.yaml"
DEEPSPEED = "deepspeed.json"
ENVIRONMENT = "environment.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"


def run_identifier(config: RunConfig) -> str:
    """Return an identifier for the run in ``config.out``: a new one, or its own if it was killed before its first
    checkpoint.
    """
    path = config.out / RECORD
    if path.exists() and (rows := records.read(path)):
        return str(rows[0]["run"])
    return uuid.uuid4().hex


class RunOutput:
    """The output of one process of a run. Once it is open, no disk that is full ends the run.

    Parameters
    ----------
    config
        Settings; written to ``config.yaml`` in the run folder.
    run
        The run's identifier.
    step
        Step that the run goes on from; rows of the record after it are dropped. None for a run that starts.
    world
        This rank's place.
    deepspeed
        DeepSpeed's JSON.
    data
        The stage's fingerprint of the data.
    """

    def __init__(
        self,
        config: RunConfig,
        run: str,
        step: int | None,
        world: World,
        deepspeed: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        self._record: records.Record | None = None
        self._mirrors: list[Mirror] = []
        self._progress: ProgressLine | None = None
        if not world.is_main:
            return
        _require_installed(config)
        path = config.out / RECORD
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            _write(config.out / CONFIG, to_yaml(config))
            _write(config.out / DEEPSPEED, json.dumps(deepspeed or {}, indent=1))
            _write(config.out / ENVIRONMENT, json.dumps(environment(), indent=1))
            records.truncate(path, -1 if step is None else step)
            self._record = records.Record(path)
        except OSError as error:
            raise UserError(f"The run folder {config.out} cannot be written to: {error.strerror}.") from error
        self._progress = ProgressLine(config.stage, step or 0, config.train.steps, config.track.progress)
        for kind, uri in _mirrored(config).items():
            self._mirrors.append(Mirror(replace(target(config, run, uri, data), kind=kind)))

    def row(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add a row to the record; floats that are not finite become null, and addresses lose their passwords."""
        if self._record is not None:
            finite = {name: _told(value) for name, value in values.items()}
            before = self._record.trouble
            self._record.append(kind, step, finite)
            if self._record.trouble is not None and before is None:
                reason = self._record.trouble.strerror
                self.say(f"warning: {self._record.path} cannot be written ({reason}): training goes on, rows are kept")

    def event(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Add a row that says what happened."""
        self.row("event", step, {"event": event, **values})

    def progress(self, step: int, figures: str = "") -> None:
        """Show the step, and ``figures`` if there are new ones."""
        if self._progress is not None:
            self._progress.update(step, figures)

    def say(self, message: str) -> None:
        """Print a line."""
        if self._progress is not None:
            self._progress.say(without_passwords(message))

    def sync(self) -> None:
        """Wait until the record is on the disk; may be called in another thread."""
        if self._record is not None and (error := self._record.sync()) is not None:
            self.say(f"warning: {self._record.path} may not be on the disk: {error.strerror}")

    def close(self, status: str) -> None:
        """Close all, with MLflow's ``status``: FINISHED, KILLED or FAILED."""
        if self._progress is not None:
            self._progress.close()
        if self._record is not None:
            self._record.close()
            if self._record.kept:
                self.say(f"warning: {self._record.kept} rows of {self._record.path} could not be written")
        for mirror in self._mirrors:
            if complaint := mirror.close(status):
                self.say(f"warning: {complaint}")


def _mirrored(config: RunConfig) -> dict[Kind, str]:
    """Return where each tracker that is asked for is sent to."""
    track, found = config.track, dict[Kind, str]()
    if track.mlflow:
        found["mlflow"] = tracking_uri(track.uri, config.out)
    if track.tensorboard:
        found["tensorboard"] = str(config.out / TENSORBOARD)
    if track.wandb:
        found["wandb"] = f"project {track.experiment}"
    return found


def _require_installed(config: RunConfig) -> None:
    for extra, asked in (("tensorboard", config.track.tensorboard), ("wandb", config.track.wandb)):
        if asked and importlib.util.find_spec(extra) is None:
            raise UserError(f"track.{extra} needs the package {extra}: pip install 'bgen-flow[{extra}]'.")


def target(config: RunConfig, run: str, uri: str, data: dict[str, Any] | None) -> Target:
    """What is sent to MLflow of the run in ``config.out``; ``data`` is the stage's fingerprint of the data."""
    params = flatten(config.model_dump(mode="json"))
    dataset = None
    if data is not None:
        params |= flatten(data, "fingerprint.")
    if data is not None and isinstance(config, Config):
        store = without_passwords(config.data.store)
        dataset = (store.rstrip("/").rsplit("/", 1)[-1], str(data.get("store", "")), store)
    return Target(
        str(config.out / RECORD),
        uri,
        config.track.experiment,
        config.track.run_name or config.out.resolve().name,
        run,
        params,
        [str(config.out / name) for name in (CONFIG, DEEPSPEED, ENVIRONMENT)],
        dataset,
        str(config.out / CHECKPOINTS) if config.track.checkpoints else None,
    )


def _told(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return without_passwords(value) if isinstance(value, str) else value


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all: an earlier one is not lost to a disk that is full."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

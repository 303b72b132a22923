"""The MLflow run that a training run is written to, from its record.

``record.jsonl`` is the queue: rows that could not be sent are sent when the server is back, or after the next restart,
and nothing waits in memory. During training :mod:`bgen.track.mirror` does it, in a process of its own.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgen.errors import UserError
from bgen.passwords import without_passwords
from bgen.track.record import Tail, metrics_of
from bgen.track.target import Target

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Name of the tag by which a restarted job finds its run again.
RUN_TAG = "bgen.run"
# Entries of one request that every MLflow server accepts.
BATCH = 900
PARAMS = 100
# Name of the tag that says which checkpoints the run has as a whole; MLflow's tags have at most 5,000 characters.
CHECKPOINTS_TAG = "bgen.checkpoints"
CHECKPOINTS_NAMED = 100


def tracking_uri(uri: str | None, run_folder: Path) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else a sqlite file beside the run folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_folder.resolve().parent / 'mlflow.db'}"


def artifact_place(uri: str) -> str | None:
    """Where a new experiment's artifacts go: beside a sqlite file; None: where the server says."""
    if not uri.startswith("sqlite:///"):
        return None
    # MLflow would put artifacts into ./mlruns of whatever the current folder is.
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


class MlflowRun:
    """Sends the rows of a record to one MLflow run."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.run_id = ""
        self._client: MlflowClient | None = None
        self._sent = 0
        self._tail = Tail(Path(target.record))
        self._sent_before: dict[str, int] = {}
        self._resumed = False
        self._saved: list[str] = []

    def send_all(self, status: str | None) -> int:
        """Send now what the run does not have yet, and set its ``status``; return how many values were new.

        Raises
        ------
        UserError
            If MLflow does not answer.
        """
        try:
            self.connect(new_attempt=False)
            self.send()
            if status is not None:
                self.finish(status)
        except Exception as error:  # whatever MLflow raises
            raise UserError(f"MLflow at {self.target.place} does not answer: {what_failed(error)}") from None
        return self._sent

    def finish(self, status: str) -> None:
        """Set the run's status: FINISHED, KILLED or FAILED; only after :meth:`connect`."""
        assert self._client is not None
        self._client.set_terminated(self.run_id, status)

    def client(self) -> MlflowClient:
        """A client of the tracking server."""
        prepare()
        from mlflow import MlflowClient

        quieten()
        return MlflowClient(tracking_uri=self.target.uri)

    def connect(self, new_attempt: bool = True) -> None:
        """Find the run or create it, unless that is done; a new attempt also logs the files."""
        if self._client is not None:
            return
        client = self.client()
        experiment = client.get_experiment_by_name(self.target.experiment)
        if experiment is None:
            place = artifact_place(self.target.uri)
            experiment_id = client.create_experiment(self.target.experiment, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{self.target.run}'", max_results=1)
        attempt = 0
        if found:
            self.run_id = found[0].info.run_id
            attempt = int(found[0].data.tags.get("bgen.attempts", "0"))
            self._resumed = True
        else:
            created = client.create_run(experiment_id, run_name=self.target.run_name, tags={RUN_TAG: self.target.run})
            self.run_id = created.info.run_id
            self._log_params(client)
        if new_attempt or attempt == 0:
            attempt += 1
            client.update_run(self.run_id, status="RUNNING")
            client.set_tag(self.run_id, "bgen.attempts", str(attempt))
            for path in self.target.artifacts:
                if Path(path).exists():
                    client.log_artifact(self.run_id, path, f"attempt_{attempt}")
            self._log_dataset(client)
        self._client = client

    def _log_dataset(self, client: MlflowClient) -> None:
        from mlflow.entities import Dataset, DatasetInput

        if self.target.dataset is not None:
            name, digest, source = self.target.dataset
            # MLflow's digests have at most 36 characters.
            dataset = Dataset(name, digest[:36], "local", json.dumps({"uri": source}))
            client.log_inputs(self.run_id, datasets=[DatasetInput(dataset)])

    def _log_params(self, client: MlflowClient) -> None:
        from mlflow.entities import Param

        params = [Param(name, value[:5900]) for name, value in self.target.params.items()]
        for begin in range(0, len(params), PARAMS):
            client.log_batch(self.run_id, params=params[begin : begin + PARAMS])

    def send(self) -> None:
        """Send the complete lines after the last one sent."""
        from mlflow.entities import Metric

        assert self._client is not None
        metrics: list[Metric] = []
        for row in self._tail.rows():
            if row.get("event") == "checkpoint" and row["checkpoint"] not in self._saved:
                self._saved.append(row["checkpoint"])
            metrics += [Metric(*entry) for entry in metrics_of(row) if entry[3] > self._last_step(entry[0])]
            if len(metrics) > BATCH - 50:
                self._client.log_batch(self.run_id, metrics=metrics)
                self._sent += len(metrics)
                self._tail.keep()
                metrics = []
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)
            self._sent += len(metrics)
        self._tail.keep()
        if self.target.checkpoints is not None and self._saved:
            self._log_checkpoints(self.target.checkpoints)

    def _log_checkpoints(self, root: str) -> None:
        """Log those that the run does not have and that are still there: only the last few are kept."""
        assert self._client is not None
        logged = self._client.get_run(self.run_id).data.tags.get(CHECKPOINTS_TAG, "").split()
        for name in list(self._saved):
            folder = Path(root, name)
            if name not in logged and folder.is_dir():
                self._client.log_artifacts(self.run_id, str(folder), f"checkpoints/{name}")
                logged.append(name)
                self._client.set_tag(self.run_id, CHECKPOINTS_TAG, " ".join(logged[-CHECKPOINTS_NAMED:]))
            self._saved.remove(name)

    def _last_step(self, key: str) -> int:
        """Last step of ``key`` that the run had when this process started: MLflow would keep both points of a step."""
        if key not in self._sent_before:
            steps = [-1]
            if self._resumed:
                assert self._client is not None
                steps += [metric.step for metric in self._client.get_metric_history(self.run_id, key)]
            self._sent_before[key] = max(steps)
        return self._sent_before[key]


def prepare() -> None:
    """Set what MLflow reads when it is imported and at every request, unless the user has; call it before an import."""
    # MLflow would tell its makers of every run.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # By default it retries for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")


def quieten() -> None:
    """Keep MLflow's news of its database out of the terminal; call it after an import, which sets the levels anew."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def what_failed(error: Exception) -> str:
    """Return the first line of what MLflow raised: it has no common base class for what its transport raises."""
    return without_passwords(str(error)).splitlines()[0][:300] if str(error) else type(error).__name__


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as ``{"a.b": "value"}``, for MLflow's parameters."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat

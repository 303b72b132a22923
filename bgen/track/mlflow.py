"""MLflow as a mirror of the record: it may be slow, down or gone, and training does not notice.

A background thread reads ``record.jsonl`` behind the trainer and sends what is new. So the file is the queue: what
could not be sent is sent when the server is back, or after the next restart, and nothing waits in memory. Rank 0 only.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgen.config.errors import UserError
from bgen.track.record import Row

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Name of the tag by which a restarted job finds its run again.
RUN_TAG = "bgen.run"
# Entries of one request that every MLflow server accepts.
BATCH = 900
PARAMS = 100
# Seconds given to what is left at the end: a fresh sqlite file is migrated first, a server has answered or has not.
CLOSE_SQLITE = 60.0
CLOSE_SERVER = 8.0
# MLflow shows what begins with "system/" on a page of its own.
PREFIX = {"hosts": "system"}
# Longest pause between attempts when the server is down, in seconds.
PAUSE = 60.0
# Seconds between two requests: each takes some 60 ms of this process, and small models have a new row more often.
PACE = 5.0


def tracking_uri(uri: str | None, run_folder: Path) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else a sqlite file beside the run folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_folder.resolve().parent / 'mlflow.db'}"


class MlflowMirror:
    """Sends the rows of a record to one MLflow run, from a thread.

    Parameters
    ----------
    record
        The JSONL file; rows are only ever appended while the mirror lives.
    uri
        Tracking URI.
    experiment, run_name
        Where the run appears.
    run
        Identifier of the training run, the same across restarts; the MLflow run carries it as a tag.
    params
        The resolved configuration, flattened; logged when the run is created (MLflow does not allow changes).
    artifacts
        Files logged at every start, as ``attempt_N/<name>``.
    dataset
        Name, digest and place of the training data: the run's input. None: not said.
    """

    def __init__(
        self,
        record: Path,
        uri: str,
        experiment: str,
        run_name: str,
        run: str,
        params: dict[str, str],
        artifacts: list[Path],
        dataset: tuple[str, str, str] | None = None,
    ) -> None:
        self.uri, self.experiment, self.run = uri, experiment, run
        self.failures = 0
        self.last_error = ""
        self.run_id = ""
        self._record, self._run_name = record, run_name
        self._params, self._artifacts, self._dataset = params, artifacts, dataset
        self._client: MlflowClient | None = None
        self._sent = 0
        self._offset = 0
        self._sent_before: dict[str, int] = {}
        self._resumed = False
        self._status = "FINISHED"
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._complete = threading.Event()
        self._thread = threading.Thread(target=self._work, name="bgen-mlflow", daemon=True)

    def start(self) -> None:
        """Begin to mirror; returns at once."""
        self._thread.start()

    def send_all(self, status: str | None) -> int:
        """Send now what the run does not have yet, and set its ``status``; returns how many values were new.

        Raises
        ------
        UserError
            If MLflow does not answer.
        """
        try:
            self._connect(new_attempt=False)
            self._send()
            if status is not None and self._client is not None:
                self._client.set_terminated(self.run_id, status)
        except Exception as error:  # whatever MLflow raises
            raise UserError(f"MLflow at {self.uri} does not answer: {str(error).splitlines()[0][:300]}") from error
        return self._sent

    def wake(self) -> None:
        """Say that the record has grown; returns at once."""
        self._wake.set()

    def close(self, status: str) -> str | None:
        """Send what is left within a time limit; returns a line that says what is wrong, if anything is.

        Parameters
        ----------
        status
            MLflow's status for the run: FINISHED, KILLED or FAILED.
        """
        self._status = status
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_SQLITE if self.uri.startswith("sqlite") else CLOSE_SERVER)
        if self._complete.is_set():
            return None
        reason = f"{self.failures} failed attempts, last: {self.last_error}" if self.failures else "no answer in time"
        return f"MLflow at {self.uri} did not receive everything ({reason}). The record is complete: {self._record}"

    def _work(self) -> None:
        pause = 1.0
        while True:
            closing = self._closing.is_set()
            self._wake.clear()
            try:
                self._connect()
                self._send()
                if closing:
                    assert self._client is not None
                    self._client.set_terminated(self.run_id, self._status)
                    self._complete.set()
                pause = 1.0
                wait = None
            except Exception as error:  # whatever MLflow raises, training goes on
                self.failures += 1
                self.last_error = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                wait, pause = pause, min(2 * pause, PAUSE)
            if closing:
                return
            if wait is None:
                self._wake.wait()
            self._closing.wait(PACE if wait is None else wait)

    def client(self) -> MlflowClient:
        """A client of the tracking server."""
        _do_not_wait_for_servers()
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return MlflowClient(tracking_uri=self.uri)

    def _connect(self, new_attempt: bool = True) -> None:
        if self._client is not None:
            return
        client = self.client()
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            place = None
            if self.uri.startswith("sqlite:///"):
                # MLflow would put artifacts into ./mlruns of whatever the current folder is.
                place = (Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
            experiment_id = client.create_experiment(self.experiment, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{self.run}'", max_results=1)
        attempt = 0
        if found:
            self.run_id = found[0].info.run_id
            attempt = int(found[0].data.tags.get("bgen.attempts", "0"))
            self._resumed = True
        else:
            created = client.create_run(experiment_id, run_name=self._run_name, tags={RUN_TAG: self.run})
            self.run_id = created.info.run_id
            self._log_params(client)
        if new_attempt or attempt == 0:
            attempt += 1
            client.update_run(self.run_id, status="RUNNING")
            client.set_tag(self.run_id, "bgen.attempts", str(attempt))
            for path in self._artifacts:
                if path.exists():
                    client.log_artifact(self.run_id, str(path), f"attempt_{attempt}")
            self._log_dataset(client)
        self._client = client

    def _log_dataset(self, client: MlflowClient) -> None:
        from mlflow.entities import Dataset, DatasetInput

        if self._dataset is not None:
            name, digest, source = self._dataset
            # MLflow's digests have at most 36 characters.
            dataset = Dataset(name, digest[:36], "local", json.dumps({"uri": source}))
            client.log_inputs(self.run_id, datasets=[DatasetInput(dataset)])

    def _log_params(self, client: MlflowClient) -> None:
        from mlflow.entities import Param

        params = [Param(name, value[:5900]) for name, value in self._params.items()]
        for begin in range(0, len(params), PARAMS):
            client.log_batch(self.run_id, params=params[begin : begin + PARAMS])

    def _send(self) -> None:
        """Send the complete lines after the last one sent."""
        from mlflow.entities import Metric

        assert self._client is not None
        with self._record.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        data = data[: data.rfind(b"\n") + 1]
        metrics: list[Metric] = []
        offset = self._offset
        for line in data.splitlines(keepends=True):
            row = json.loads(line)
            metrics += [Metric(*entry) for entry in self._metrics(row)]
            offset += len(line)
            if len(metrics) > BATCH - 50:
                self._client.log_batch(self.run_id, metrics=metrics)
                self._sent += len(metrics)
                self._offset, metrics = offset, []
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)
            self._sent += len(metrics)
        self._offset = offset

    def _metrics(self, row: Row) -> list[tuple[str, float, int, int]]:
        if row["kind"] == "event":
            return []
        moment = int(1000 * row.get("time", time.time()))
        found = []
        for name, value in row.items():
            if name in ("kind", "step", "time") or not isinstance(value, int | float):
                continue
            key = f"{PREFIX.get(row['kind'], row['kind'])}/{name}"
            if row["step"] > self._last_step(key):
                found.append((key, float(value), moment, int(row["step"])))
        return found

    def _last_step(self, key: str) -> int:
        """Last step of ``key`` that the run had when this process started: MLflow would keep both points of a step."""
        if key not in self._sent_before:
            steps = [-1]
            if self._resumed:
                assert self._client is not None
                steps += [metric.step for metric in self._client.get_metric_history(self.run_id, key)]
            self._sent_before[key] = max(steps)
        return self._sent_before[key]


def _do_not_wait_for_servers() -> None:
    """Read by MLflow at every request. Its defaults retry for minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as ``{"a.b": "value"}``, for MLflow's parameters."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat

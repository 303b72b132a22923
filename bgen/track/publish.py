"""What is sent to MLflow outside of training: a record after an outage, evaluations, the exported model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgen.config.load import load_either
from bgen.errors import UserError
from bgen.passwords import without_passwords
from bgen.track import record as records
from bgen.track.mlflow import RUN_TAG, MlflowRun, prepare, tracking_uri, what_failed
from bgen.track.output import CONFIG, RECORD, target
from bgen.track.pyfunc import Served, checksums
from bgen.track.registry import add_version, log_directory

if TYPE_CHECKING:
    from mlflow import MlflowClient

STATUS = {"end": "FINISHED", "interrupted": "KILLED"}


def sync(run: Path, uri: str | None = None) -> str:
    """``bgen track sync``: send everything in the record of a run that its MLflow run does not have yet.

    Parameters
    ----------
    run
        Run folder.
    uri
        Tracking URI; default: the one of the run's configuration.

    Returns
    -------
    A line that says what is where now.

    Raises
    ------
    UserError
        If ``run`` is no run folder, or MLflow does not answer.
    """
    there = _run(run, uri)
    rows = records.read(run / RECORD)
    status = next((STATUS[row["event"]] for row in reversed(rows) if row.get("event") in STATUS), None)
    sent = there.send_all(status)
    return f"{run}: {sent} new values at {there.target.place}, run {there.run_id}"


def log_evaluation(
    run: Path, name: str, metrics: dict[str, float], artifacts: list[Path], uri: str | None = None
) -> str:
    """Log an evaluation as a child of a run's MLflow run; returns the child's identifier.

    Raises
    ------
    UserError
        If the run is not at MLflow, or MLflow does not answer.
    """
    prepare()
    from mlflow.entities import Metric

    client, parent, experiment = _find(run, uri)
    tags = {"mlflow.parentRunId": parent, "mlflow.runName": name}
    with _answering(client):
        child: str = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        client.log_batch(child, metrics=[Metric(key, value, 0, 0) for key, value in metrics.items()])
        for path in artifacts:
            client.log_artifact(child, str(path))
        client.set_terminated(child, "FINISHED")
    return child


def log_model(run: Path, model: Path, served: Served, register: str | None = None, uri: str | None = None) -> str:
    """Log an exported model directory as an MLflow model among the artifacts of a run's MLflow run; returns its URI.

    Parameters
    ----------
    run
        Run folder.
    model
        Directory of ``bgen export``.
    served
        How MLflow serves it.
    register
        Name of a registered model that gets it as a new version.
    uri
        Tracking URI; default: the one of the run's configuration.

    Raises
    ------
    UserError
        If the run is not at MLflow, or MLflow does not answer.
    """
    client, run_id, _ = _find(run, uri)
    with _answering(client):
        source = log_directory(client, run_id, model, served)
        if register is not None:
            add_version(client, register, source, run_id, checksums(model, served.wanted))
    return without_passwords(source)


def _find(run: Path, uri: str | None) -> tuple[MlflowClient, str, str]:
    """Client, identifier of the MLflow run, identifier of its experiment."""
    there = _run(run, uri)
    client = there.client()
    found: list[Any] = []
    with _answering(client):
        experiment = client.get_experiment_by_name(there.target.experiment)
        if experiment is not None:
            wanted = f"tags.`{RUN_TAG}` = '{there.target.run}'"
            found = client.search_runs([experiment.experiment_id], wanted, max_results=1)
    if not found:
        raise UserError(f"MLflow at {there.target.place} has no run of {run}. `bgen track sync {run}` sends it.")
    return client, found[0].info.run_id, found[0].info.experiment_id


@contextmanager
def _answering(client: MlflowClient) -> Iterator[None]:
    """Turn whatever MLflow raises into a message."""
    try:
        yield
    except Exception as error:
        where = without_passwords(client.tracking_uri)
        raise UserError(f"MLflow at {where} does not answer: {what_failed(error)}") from None


def _run(run: Path, uri: str | None) -> MlflowRun:
    if not (run / CONFIG).is_file() or not (run / RECORD).is_file():
        raise UserError(f"{run} is not a run folder: it has no {CONFIG} and {RECORD}. `bgen train` makes one.")
    config = load_either(run / CONFIG)
    rows = records.read(run / RECORD)
    if not rows:
        raise UserError(f"{run / RECORD} is empty: there is nothing to send.")
    # The folder may have been moved since.
    config = config.model_copy(update={"out": run})
    return MlflowRun(target(config, str(rows[0]["run"]), tracking_uri(uri or config.track.uri, run), None))

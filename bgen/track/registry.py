"""Models of MLflow's registry: ``models:/name/version``, as ``bgen.load`` and ``bgen push`` take it.

The registry keeps the checksums of a version's files in a tag, apart from the files; a file that is not what it was is
refused. Copies are kept in the user's cache folder and compared each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgen.errors import UserError
from bgen.passwords import without_passwords
from bgen.track.mlflow import artifact_place, prepare, quieten, what_failed
from bgen.track.pyfunc import MLMODEL, Served, belongs, checksums, noted, require_unchanged, write_flavour

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ADDRESS = re.compile(r"models:/{1,3}(?P<name>[^/@\s]+)([/@](?P<version>[^/@\s]+))?")
FILES_TAG = "bgen.files"
"""Tag of a version: the checksums of its files, as JSON."""
EXPERIMENT = "bgen"


def is_address(where: object) -> bool:
    """Whether a model is named by an address in MLflow's registry."""
    return str(where).startswith("models:/")


def fetch(address: str | Path, revision: str | None, wanted: Sequence[str]) -> Path:
    """Bring a registered model into the cache, or find it there, and return its folder.

    Parameters
    ----------
    address
        ``models:/name/version``, ``models:/name@alias``, or ``models:/name`` for the newest version.
    revision
        The version or alias, if the address gives none.
    wanted
        Patterns of the names of a model directory's files; whatever else is there stays there.

    Raises
    ------
    UserError
        If no registry is named, it does not answer or has no such model, or a file is not what was registered.
    """
    name, version = _parse(address, revision)
    client, place = _client()
    with _answering(place, name):
        found = _version(client, name, version)
        known = json.loads(found.tags[FILES_TAG]) if FILES_TAG in found.tags else None
        told = known or [place, name, found.version, found.creation_timestamp, found.source]
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        folder = _cache() / "models" / key
        if not folder.is_dir():
            source = client.get_model_version_download_uri(name, found.version)
            _download(client, source, wanted, known, folder)
    advice = f"It is a copy that was changed or damaged on this machine: remove {folder}, and load again."
    _require(folder, known, wanted, advice)
    return folder


def register(model: Path, name: str, served: Served, message: str | None = None) -> str:
    """Put a model directory into the registry as a new version, in a run of its own; return its address.

    Parameters
    ----------
    name
        ``models:/name``.
    message
        Description of the version.

    Raises
    ------
    UserError
        If the address is wrong, no registry is named, or it does not answer.
    """
    known, version = _parse(name, None)
    if version is not None:
        raise UserError(f"The registry counts versions itself: write models:/{known}.")
    client, place = _client()
    with _answering(place, known):
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            number = client.create_experiment(EXPERIMENT, artifact_location=artifact_place(client.tracking_uri))
        else:
            number = experiment.experiment_id
        run_id = client.create_run(number, run_name=known).info.run_id
        source = log_directory(client, run_id, model, served)
        client.set_terminated(run_id, "FINISHED")
        made = add_version(client, known, source, run_id, checksums(model, served.wanted), message)
    return f"models:/{known}/{made}"


def log_directory(client: MlflowClient, run_id: str, model: Path, served: Served) -> str:
    """Log a model directory as an MLflow model of a run, and return its URI.

    Its folder is named after its contents, so that one that a run logs later does not write over it.
    """
    files = checksums(model, served.wanted)
    folder = f"model/{hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]}"
    with tempfile.TemporaryDirectory() as scratch:
        write_flavour(model, served, Path(scratch))
        client.log_artifacts(run_id, scratch, folder)
    for name in files:
        client.log_artifact(run_id, str(model / name), folder)
    return f"{client.get_run(run_id).info.artifact_uri}/{folder}"


def add_version(
    client: MlflowClient, name: str, source: str, run_id: str, files: dict[str, str], message: str | None = None
) -> str:
    """Make what was logged a new version of a registered model, which is made if there is none; return its number."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    made = client.create_model_version(
        name, source, run_id, tags={FILES_TAG: json.dumps(files, sort_keys=True)}, description=message
    )
    return str(made.version)


def _parse(address: str | Path, revision: str | None) -> tuple[str, str | None]:
    found = _ADDRESS.fullmatch(str(address))
    if found is None:
        raise UserError(
            f"{address} is no address of a registered model: write models:/name/version, or models:/name@alias."
        )
    if revision is not None and found["version"] is not None and revision != found["version"]:
        raise UserError(f"{address} names one version, and revision={revision} another: give one of them.")
    return found["name"], revision or found["version"]


def _client() -> tuple[MlflowClient, str]:
    """A client of the registry that MLflow's variables or the program name, and its place as it may be shown."""
    prepare()
    import mlflow

    quieten()
    named = mlflow.is_tracking_uri_set() or "MLFLOW_REGISTRY_URI" in os.environ
    if not named:
        raise UserError(
            "models:/ needs to know which registry: set MLFLOW_TRACKING_URI, such as sqlite:///runs/mlflow.db."
        )
    client = mlflow.MlflowClient()
    return client, without_passwords(str(mlflow.get_registry_uri()))


def _version(client: MlflowClient, name: str, version: str | None) -> Any:
    """Return the registry's record of a version, an alias, or the newest version."""
    if version is None or version == "latest":
        versions = client.search_model_versions(f"name = '{name}'")
        if not versions:
            raise UserError(f"MLflow's registry has no model {name}.")
        newest = max(int(each.version) for each in versions)
        return client.get_model_version(name, str(newest))
    if version.isdigit():
        return client.get_model_version(name, version)
    return client.get_model_version_by_alias(name, version)


def _require(folder: Path, known: dict[str, str] | None, wanted: Sequence[str], advice: str) -> None:
    """Compare files with what the registry knows of them, or, where it knows nothing, with what MLflow's file notes."""
    known = known or noted(folder)
    if known is not None:
        require_unchanged(folder, known, wanted, advice)


def _download(
    client: MlflowClient, source: str, wanted: Sequence[str], known: dict[str, str] | None, folder: Path
) -> None:
    """Copy the files of a model directory, into the folder whole or not at all, if they are what was registered."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    uri = client.tracking_uri
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".half-"))
    try:
        for entry in list_artifacts(artifact_uri=source, tracking_uri=uri):
            name = entry.path.rsplit("/", 1)[-1]
            if not entry.is_dir and belongs(name, [*wanted, MLMODEL]):
                download_artifacts(artifact_uri=f"{source}/{name}", dst_path=str(half), tracking_uri=uri)
        _require(half, known, wanted, f"{without_passwords(source)} was changed since: register the model again.")
        try:
            half.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bgen"


@contextmanager
def _answering(place: str, name: str) -> Iterator[None]:
    """Turn whatever MLflow raises into a message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            raise UserError(f"MLflow's registry at {place} has not {name}: {what_failed(error)}") from None
        raise UserError(f"MLflow at {place} refuses {name}, or does not answer: {what_failed(error)}") from None

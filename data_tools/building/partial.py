"""The folder that a store is written in: it becomes the store, or vanishes, or waits for the build to go on.

A build that can go on after it was killed writes in ``.<name>.partial`` and keeps a **plan** there: what it builds, and
from what. When it is killed the folder stays; the same build goes on with it, and another one refuses it.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from bgen.errors import UserError

WORK = "build"
"""Folder in the partial one for what is not part of the store."""

Plan = Mapping[str, str]
"""What a build depends on (inputs, options), each under a name for people."""


class Interrupted(UserError):
    """A build that stopped through no fault of its input; what it has done so far is kept."""


@contextmanager
def all_or_nothing(folder: Path, plan: Plan | None = None, *, restart: bool = False) -> Iterator[Path]:
    """Give a folder to write in; it becomes ``folder`` if all goes well, and vanishes otherwise.

    Parameters
    ----------
    folder
        The final folder; must not be there, or be empty.
    plan
        Lets a build of the same plan go on where one was killed; None: nothing stays in any case.
    restart
        Throw away what another build left.

    Raises
    ------
    UserError
        If ``folder`` is not empty or cannot be written, the disk is full, another build is writing there, or one of
        another plan left something there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty. Choose another --out, or remove it first.")
    partial = folder.with_name(f".{folder.name}.partial" + (f"-{os.getpid()}" if plan is None else ""))
    try:
        (partial / WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}). Choose another --out.") from None
    with (partial / WORK / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"Another build is writing {folder}. Wait for it, or choose another --out.") from None
        if plan is not None:
            _take_up(partial, plan, folder, restart)
        try:
            yield partial
            shutil.rmtree(partial / WORK)
            _sync(partial)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        except Interrupted:
            raise
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _explain(error, folder) from None
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except BaseException:  # stopped by the user or the system
            if plan is None:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def save_array(path: Path, array: ArrayLike) -> None:
    """Write a .npy file as :func:`commit` does."""
    stream = io.BytesIO()
    np.save(stream, array)
    with stream.getbuffer() as data:
        commit(path, data)


def commit(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all; when this returns, it is on the disk."""
    half = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with half.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    half.rename(path)


def _take_up(partial: Path, plan: Plan, folder: Path, restart: bool) -> None:
    """Go on with a build of this plan, or begin one.

    Raises
    ------
    UserError
        If a build of another plan was interrupted here.
    """
    path = partial / WORK / "plan.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None  # nothing was begun
    if before is not None and before != plan and not restart:
        other = ", ".join(sorted(name for name in plan.keys() | before.keys() if plan.get(name) != before.get(name)))
        raise UserError(
            f"A build of {folder} was interrupted, and this one differs from it in: {other}. Repeat that one to go on"
            f" with it, or throw away what it did with --restart (it is in {partial})."
        )
    if before != plan or restart:
        for item in partial.iterdir():
            if item.name != WORK:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        for item in (partial / WORK).iterdir():
            if item.name != "lock":
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        commit(path, json.dumps(dict(plan), indent=1).encode())


def _explain(error: OSError, folder: Path) -> UserError:
    # numpy reports a write that was cut short without the system's error number
    said = str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in said or "requested and" in said:
        free = shutil.disk_usage(folder.parent).free
        return UserError(
            f"The disk of {folder.parent} is full: {free / 1e6:,.1f} MB are free without the unfinished store."
            " Nothing was kept. Make room, or choose an --out on another disk."
        )
    return UserError(f"{folder} cannot be written ({error}). Nothing was kept.")


def _sync(folder: Path) -> None:
    """Ask the system to put every file and folder on the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

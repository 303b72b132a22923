"""The folder that a store is written in: it becomes the store, or vanishes, or waits for the build to go on.

A build that can go on after it was stopped writes in ``.<name>.partial`` and keeps a **plan** there: what it builds,
and from what. The folder stays whatever stops the build, a signal, a full disk or a file that cannot be read for a
moment, unless its input is wrong; the same build goes on with it, and another one refuses it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from bgen.errors import UserError
from bgen.files import sync_file

WORK = "build"
"""Folder in the partial one for what is not part of the store."""

Plan = Mapping[str, str]
"""What a build depends on (inputs, options), each under a name for people."""


KEPT = "What is done so far is kept in {}: the same command goes on with it."


class Interrupted(UserError):
    """A build that stopped through no fault of its input; what it has done so far is kept."""


@contextmanager
def all_or_nothing(
    folder: Path, plan: Plan | None = None, *, restart: bool = False, what: str = "build"
) -> Iterator[Path]:
    """Give a folder to write in; it becomes ``folder`` if all goes well, and vanishes otherwise.

    Parameters
    ----------
    folder
        The final folder; must not be there, or be empty.
    plan
        Lets a build of the same plan go on where one was stopped; None: nothing stays in any case.
    restart
        Throw away what another build left.
    what
        What messages call the work: "build", "run".

    Raises
    ------
    UserError
        If ``folder`` is not empty or cannot be written, the disk is full, another build is writing there, or one of
        another plan left something there. It is :class:`Interrupted` where the work is kept.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty. Choose another --out, or remove it first.")
    partial, lost = _place(folder, kept=plan is not None)
    with _open_lock(partial) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"Another {what} is writing {folder}. Wait for it, or choose another --out.") from None
        if plan is not None:
            _take_up(partial, plan, folder, restart, what)
        try:
            yield partial
            _sync(partial)
            shutil.rmtree(partial / WORK)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        except (Interrupted, OSError) as error:
            said = str(error) if isinstance(error, UserError) else _explain(error, folder)
            raise Interrupted(f"{said} {'Nothing was kept.' if plan is None else KEPT.format(partial)}") from None
        except UserError:  # the input is wrong, and will not build another time either
            lost = lost or partial
            raise
        except Exception as error:  # a fault of the program or its libraries
            if plan is not None:
                error.add_note(KEPT.format(partial))
            raise
        finally:
            if lost is not None:
                shutil.rmtree(lost, ignore_errors=True)


def _place(folder: Path, *, kept: bool) -> tuple[Path, Path | None]:
    """Return a folder to write in, and what of it has to vanish at the end.

    Raises
    ------
    UserError
        If it cannot be made, or is not this user's own: somebody may have planted it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    lost = None
    try:
        if not kept:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lost = Path(tempfile.mkdtemp(prefix=".bgen-", dir=folder.parent))
            partial = lost / folder.name
        partial.mkdir(parents=True, exist_ok=True)
        about = partial.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            raise UserError(f"{partial} is a link, or another user's. Remove it, or choose another --out.")
        (partial / WORK).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}). Choose another --out.") from None
    return partial, lost


@contextmanager
def _open_lock(partial: Path) -> Iterator[int]:
    handle = os.open(partial / WORK / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def save_array(path: Path, array: ArrayLike) -> None:
    """Write a .npy file as :func:`commit` does."""
    with _half(path) as stream:
        np.save(stream, np.asarray(array))


def commit(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all; when this returns, it is on the disk."""
    with _half(path) as stream:
        stream.write(data)


@contextmanager
def _half(path: Path) -> Iterator[BinaryIO]:
    half = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with half.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    half.rename(path)


def _take_up(partial: Path, plan: Plan, folder: Path, restart: bool, what: str) -> None:
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
            f"A {what} of {folder} was interrupted, and this one differs from it in: {other}. Repeat that one to go on"
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


def _explain(error: OSError, folder: Path) -> str:
    # numpy reports a write that was cut short without the system's error number
    said = str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in said or "requested and" in said:
        free = shutil.disk_usage(folder.parent).free
        return f"The disk of {folder.parent} is full ({free / 1e6:,.1f} MB are free). Make room there."
    return f"{folder} cannot be written ({error})."


def _sync(folder: Path) -> None:
    """Ask the system to put every file and folder of a store on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.relative_to(folder).parts[:1] == (WORK,):
            continue
        sync_file(path)

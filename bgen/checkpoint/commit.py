"""Writing checkpoints beside training, so that the last committed one is whole whenever the job is killed.

Every rank copies its tensors, goes on training, and writes and hashes the copy in a thread, into ``step_N.tmp``. When
all ranks are known to be done, rank 0 writes the manifest, renames the folder and writes the marker last. The thread of
a rank never waits for another rank: the trainer exchanges the states of the ranks along with the losses that it adds up
anyway, so all pass from one phase to the next at the same step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bgen.checkpoint import files, shards
from bgen.checkpoint.ownership import Owner, Superseded
from bgen.distributed import world as ranks
from bgen.distributed.patience import Work, nothing, wait

# What a checkpoint needs beside its tensors: headers, state, manifest, block sizes of the file system.
OVERHEAD = 1 << 18


class SaveError(RuntimeError):
    """A checkpoint could not be written; every rank raises it, and the earlier checkpoints are untouched."""


class SaveHangs(SaveError):
    """Writing a checkpoint has not come to an end in the time that it may take; it is not waited for any longer."""


@dataclass(frozen=True)
class Frozen:
    """Parameters that never change, of which rank 0 writes one copy for all checkpoints.

    Attributes
    ----------
    bytes
        Their size.
    tensors
        Returns them on the CPU, by :func:`bgen.checkpoint.shards.key`; called in a thread, and only if they have to be
        written.
    """

    bytes: int
    tensors: Callable[[], dict[str, Tensor]]


class Checkpoints:
    """The checkpoints of one run, in ``root`` on a file system that all ranks share.

    :meth:`begin` starts a checkpoint; :meth:`advance`, called with the sums of :meth:`status` over ranks, takes it to
    its next phase; :meth:`finish` waits for it. All ranks call each of them together.

    Parameters
    ----------
    root
        The run's ``checkpoints`` folder.
    keep
        Newest good checkpoints kept, at least 2.
    keep_every
        Checkpoints at multiples of so many steps are kept as well; 0: none.
    patience
        Seconds that a checkpoint may take from its beginning, if it has to be waited for.
    beat
        Called every second while one is waited for.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        keep_every: int = 0,
        patience: float = math.inf,
        beat: Callable[[], None] = nothing,
    ) -> None:
        assert keep >= 2
        self.root, self.keep, self.keep_every = root, keep, keep_every
        self.owner: Owner | None = None
        self._patience, self._beat = patience, beat
        # Checkpoints whose files this process wrote or verified; others are verified before an older one is deleted.
        self._good: set[str] = set()
        self._work: Work | None = None
        self._committing = False
        self._begun = 0.0
        self._target = root
        self._step = 0
        self._facts: dict[str, Any] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._before: Callable[[], None] = nothing
        self._frozen_digest: str | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and is neither committed nor given up."""
        return self._work is not None

    def begin(
        self,
        step: int,
        tensors: dict[str, Tensor],
        shapes: dict[str, tuple[int, ...]],
        state: str,
        facts: dict[str, Any],
        frozen: Frozen | None = None,
        before: Callable[[], None] = nothing,
    ) -> None:
        """Start to write the checkpoint after ``step`` steps; none may be pending.

        Parameters
        ----------
        step
            Optimiser steps done.
        tensors, shapes
            As :func:`bgen.checkpoint.shards.write` takes them, this rank's share. Nobody may change them any more.
        state
            Text of ``state.json``; that of rank 0 is written.
        facts
            JSON values for the manifest, such as the number of ranks and the ZeRO stage.
        frozen
            Frozen parameters; those of rank 0 are written, unless an earlier checkpoint has them.
        before
            Called in rank 0's thread before the checkpoint is committed.

        Raises
        ------
        SaveError
            On every rank, if the disk has no room or the folder cannot be made.
        """
        assert not self.pending
        here = ranks.current()
        self._step, self._facts, self._entries, self._before = step, facts, {}, before
        self._begun = time.monotonic()
        self._target = self.root / files.folder_name(step)
        self._prepare(sum(t.numel() * t.element_size() for t in tensors.values()) + OVERHEAD, frozen)
        temporary = self._temporary

        def write() -> None:
            name = shards.file_name(here.rank)
            self._entries[name] = shards.write(temporary / name, tensors, shapes)
            if here.is_main:
                path = temporary / files.STATE
                files.write_synced(path, state)
                self._entries[files.STATE] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
                if frozen is not None:
                    self._entries[shards.FROZEN] = self._link_or_write(temporary / shards.FROZEN, frozen)

        self._work = Work(write)

    def status(self) -> tuple[int, int]:
        """Whether this rank has done its part of the phase, and whether it failed: 0 or 1 each."""
        work = self._work
        if work is None or work.running or work.idle:
            return 0, 0
        return int(work.error is None), int(work.error is not None)

    def advance(self, done: int, failed: int) -> Path | None:
        """Go to the next phase if all ranks are ready for it; returns the checkpoint when it is committed.

        Parameters
        ----------
        done, failed
            Sums over the ranks of :meth:`status`.

        Raises
        ------
        SaveError
            On every rank, if one of them could not write.
        Superseded
            On every rank, if another job owns the run by now.
        """
        if not self.pending or (failed == 0 and done < (1 if self._committing else ranks.current().size)):
            return None
        if failed or self._committing:
            return self.finish()
        self._commit()
        return None

    def finish(self) -> Path | None:
        """Wait until a pending checkpoint is committed, and return it; None if none is pending.

        Raises
        ------
        SaveError
            On every rank, if one of them could not write, or has not done so in time (SaveHangs).
        Superseded
            On every rank, if another job owns the run by now.
        """
        if not self.pending:
            return None
        if not self._committing:
            self._join()
            self._commit()
        self._join()
        self._good.add(self._target.name)
        self._work, self._committing = None, False
        return self._target

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        shapes: dict[str, tuple[int, ...]],
        state: str,
        facts: dict[str, Any],
    ) -> Path:
        """Write a checkpoint and wait for it; see :meth:`begin`."""
        self.begin(step, tensors, shapes, state, facts)
        target = self.finish()
        assert target is not None
        return target

    def newest(self) -> tuple[Path | None, list[str]]:
        """Return the newest checkpoint that verifies on all ranks, and a line for each newer one that does not."""
        messages: list[str] = []
        names = ranks.from_main([path.name for path in files.committed(self.root)])
        for name in names:
            folder = self.root / name
            found = [text for text in ranks.gather(self._damage(folder)) if text is not None]
            if not found:
                self._good.add(name)
                return folder, messages
            messages.append(f"checkpoint {name} is damaged ({found[0]})")
        return None, messages

    def _damage(self, folder: Path) -> str | None:
        """Return what this rank finds wrong with its share of a checkpoint; reading it may take long."""
        here, found = ranks.current(), []
        work = Work(lambda: found.append(files.damage(folder, here.rank, here.size)))
        wait(work, self._beat)
        return str(work.error) if work.error is not None else found[0]

    @property
    def _temporary(self) -> Path:
        """Another attempt at the run, even one that still writes, has another folder."""
        token = "" if self.owner is None else f"-{self.owner.token}"
        return self._target.with_name(f"{self._target.name}.tmp{token}")

    def _prepare(self, size: int, frozen: Frozen | None) -> None:
        """Make the temporary folder if there is room for ``size`` bytes of this rank and the other ranks'."""
        need = int(ranks.all_sum(torch.tensor([size], dtype=torch.float64)))

        def prepare() -> None:
            try:
                self._check_owner()
                self.root.mkdir(parents=True, exist_ok=True)
                for stale in files.unfinished(self.root):
                    shutil.rmtree(stale, ignore_errors=True)
                room = need + (frozen.bytes if frozen is not None and not self._frozen_places() else 0)
                have = shutil.disk_usage(self.root).free
                if room > have:
                    raise SaveError(f"no space: need {_readable(room)}, have {_readable(have)} in {self.root}")
                self._temporary.mkdir(exist_ok=True)
            except OSError as error:
                raise SaveError(f"cannot make {self._temporary}: {error.strerror}") from error

        work = Work(prepare if ranks.current().is_main else None)
        self._wait(work)
        self._raise_failures(work)

    def _check_owner(self) -> None:
        if self.owner is not None:
            self.owner.check()

    def _wait(self, work: Work) -> None:
        if not wait(work, self._beat, self._begun + self._patience):
            self._work, self._committing = None, False
            raise SaveHangs(f"{self._temporary} was not written within {self._patience:g} s (train.save_timeout)")

    def _raise_failures(self, work: Work) -> None:
        """Raise on every rank what went wrong on one."""
        error = work.error
        text = None if error is None else str(error).splitlines()[0] if str(error) else type(error).__name__
        known = (SaveError, Superseded)
        failures = ranks.gather(None if error is None else ([isinstance(error, kind) for kind in known], text))
        for rank, failure in enumerate(failures):
            if failure is not None:
                is_one, text = failure
                for kind, this in zip(known, is_one, strict=True):
                    if this:
                        raise kind(text)
                free = shutil.disk_usage(self.root).free if self.root.exists() else 0
                raise SaveError(f"rank {rank} could not write {self._temporary}: {text} ({_readable(free)} free there)")

    def _join(self) -> None:
        """Wait for the phase to end on all ranks; if it failed on one, clean up and raise on all."""
        work = self._work
        assert work is not None
        self._wait(work)
        try:
            self._raise_failures(work)
        except (SaveError, Superseded):
            if ranks.current().is_main:
                shutil.rmtree(self._temporary, ignore_errors=True)
            self._work, self._committing = None, False
            raise

    def _frozen_places(self) -> list[tuple[Path, dict[str, Any]]]:
        """Good checkpoints that have a file of frozen parameters, newest first, and what their manifests say of it."""
        found = []
        for folder in files.committed(self.root):
            if folder.name in self._good:
                with contextlib.suppress(OSError, ValueError):
                    entry = files.read_manifest(folder)["files"].get(shards.FROZEN)
                    if entry is not None:
                        found.append((folder / shards.FROZEN, entry))
        return found

    def _link_or_write(self, path: Path, frozen: Frozen) -> dict[str, Any]:
        tensors: dict[str, Tensor] | None = None
        for there, entry in self._frozen_places():
            if self._frozen_digest is None:
                tensors = frozen.tensors()
                self._frozen_digest = shards.digest_of(tensors, {})
            if entry["sha256"] == self._frozen_digest:
                with contextlib.suppress(OSError):  # a file system without hard links: every checkpoint has its own
                    os.link(there, path)
                    return entry
        entry = shards.write(path, tensors or frozen.tensors(), {})
        self._frozen_digest = entry["sha256"]
        return entry

    def _commit(self) -> None:
        """All files are written: let rank 0 make a checkpoint of them, in its thread."""
        parts = ranks.gather(self._entries)
        main, target, temporary, facts = ranks.current().is_main, self._target, self._temporary, self._facts

        def commit() -> None:
            manifest = {
                "format": files.FORMAT,
                "step": self._step,
                **facts,
                "versions": {name: version(name) for name in ("torch", "deepspeed")}
                | {"python": platform.python_version()},
                "files": {name: entry for part in parts for name, entry in sorted(part.items())},
            }
            files.write_synced(temporary / files.MANIFEST, json.dumps(manifest, indent=1))
            files.sync(temporary)
            self._before()
            self._check_owner()
            if target.exists():
                files.remove(target)
            temporary.replace(target)
            files.sync(self.root)
            files.write_synced(target / files.MARKER, files.sha256(target / files.MANIFEST))
            files.sync(target)
            self._good.add(target.name)
            with contextlib.suppress(OSError):  # an old checkpoint more does no harm
                self._retire()

        self._committing = True
        self._work = Work(commit if main else None)

    def _retire(self) -> None:
        """Delete what is older than the newest ``keep`` good checkpoints, except every ``keep_every``-th step's."""
        good = 0
        for folder in files.committed(self.root):
            if good >= self.keep:
                if not (self.keep_every and files.step_of(folder) % self.keep_every == 0):
                    files.remove(folder)
            elif folder.name in self._good or files.damage(folder) is None:
                self._good.add(folder.name)
                good += 1


def _readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"

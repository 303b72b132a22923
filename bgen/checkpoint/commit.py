"""Writing checkpoints beside training, so that the last committed one is whole whenever the job is killed.

Every rank copies its tensors, goes on training, and writes and hashes the copy in a thread, into ``step_N.tmp``. When
all ranks are known to be done, rank 0 writes the manifest, renames the folder and writes the marker last. The thread of
a rank never waits for another rank: the trainer exchanges the states of the ranks along with the losses that it adds up
anyway, so all pass from one phase to the next at the same step.
"""

from __future__ import annotations

import json
import platform
import shutil
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bgen.checkpoint import files, shards
from bgen.distributed import world as ranks

# What a checkpoint needs beside its tensors: headers, state, manifest, block sizes of the file system.
OVERHEAD = 1 << 18


class SaveError(RuntimeError):
    """A checkpoint could not be written; every rank raises it, and the earlier checkpoints are untouched."""


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
    """

    def __init__(self, root: Path, keep: int, keep_every: int = 0) -> None:
        assert keep >= 2
        self.root, self.keep, self.keep_every = root, keep, keep_every
        # Checkpoints whose files this process wrote or verified; others are verified before an older one is deleted.
        self._good: set[str] = set()
        self._thread: threading.Thread | None = None
        self._committing = False
        self._failure: str | None = None
        self._target = root
        self._step = 0
        self._facts: dict[str, Any] = {}
        self._entries: dict[str, dict[str, Any]] = {}

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and is neither committed nor given up."""
        return self._thread is not None

    def begin(
        self,
        step: int,
        tensors: dict[str, Tensor],
        shapes: dict[str, tuple[int, ...]],
        state: str,
        facts: dict[str, Any],
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

        Raises
        ------
        SaveError
            On every rank, if the disk has no room or the folder cannot be made.
        """
        assert not self.pending
        here = ranks.current()
        self._step, self._facts, self._entries, self._failure = step, facts, {}, None
        self._target = self.root / files.folder_name(step)
        self._prepare(sum(t.numel() * t.element_size() for t in tensors.values()) + OVERHEAD)
        temporary = self._temporary

        def write() -> None:
            name = shards.file_name(here.rank)
            self._entries[name] = shards.write(temporary / name, tensors, shapes)
            if here.is_main:
                path = temporary / files.STATE
                files.write_synced(path, state)
                self._entries[files.STATE] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}

        self._start(write)

    def status(self) -> tuple[int, int]:
        """Whether this rank has done its part of the phase, and whether it failed: 0 or 1 each."""
        if self._thread is None or self._thread.is_alive() or (self._committing and not ranks.current().is_main):
            return 0, 0
        return int(self._failure is None), int(self._failure is not None)

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
            On every rank, if one of them could not write.
        """
        if not self.pending:
            return None
        if not self._committing:
            self._join()
            self._commit()
        self._join()
        self._good.add(self._target.name)
        self._thread, self._committing = None, False
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
        here = ranks.current()
        messages: list[str] = []
        names = ranks.from_main([path.name for path in files.committed(self.root)])
        for name in names:
            folder = self.root / name
            found = [text for text in ranks.gather(files.damage(folder, here.rank, here.size)) if text is not None]
            if not found:
                self._good.add(name)
                return folder, messages
            messages.append(f"checkpoint {name} is damaged ({found[0]})")
        return None, messages

    @property
    def _temporary(self) -> Path:
        return self._target.with_name(self._target.name + ".tmp")

    def _prepare(self, size: int) -> None:
        """Make the temporary folder if there is room for ``size`` bytes of this rank and the other ranks'."""
        need = int(ranks.all_sum(torch.tensor([size], dtype=torch.float64)))
        problem = None
        if ranks.current().is_main:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                for stale in self.root.glob("step_*.tmp"):
                    shutil.rmtree(stale)
                have = shutil.disk_usage(self.root).free
                if need > have:
                    problem = f"no space: need {_readable(need)}, have {_readable(have)} in {self.root}"
                else:
                    self._temporary.mkdir()
            except OSError as error:
                problem = f"cannot make {self._temporary}: {error.strerror}"
        problem = ranks.from_main(problem)
        if problem is not None:
            raise SaveError(problem)

    def _start(self, action: Callable[[], None]) -> None:
        def work() -> None:
            try:
                action()
            except Exception as error:  # told to the other ranks, and raised where all are together
                self._failure = str(error).splitlines()[0] if str(error) else type(error).__name__

        self._thread = threading.Thread(target=work, name="bgen-checkpoint", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        """Wait for the phase to end on all ranks; if it failed on one, clean up and raise on all."""
        assert self._thread is not None
        self._thread.join()
        failures = {rank: text for rank, text in enumerate(ranks.gather(self._failure)) if text is not None}
        if failures:
            if ranks.current().is_main:
                shutil.rmtree(self._temporary, ignore_errors=True)
            self._thread, self._committing = None, False
            rank, text = next(iter(failures.items()))
            free = shutil.disk_usage(self.root).free if self.root.exists() else 0
            raise SaveError(f"rank {rank} could not write {self._temporary}: {text} ({_readable(free)} free there)")

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
            if target.exists():
                files.remove(target)
            temporary.replace(target)
            files.sync(self.root)
            files.write_synced(target / files.MARKER, files.sha256(target / files.MANIFEST))
            files.sync(target)
            self._good.add(target.name)
            self._retire()

        self._committing = True
        self._start(commit if main else lambda: None)

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

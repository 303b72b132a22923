"""Writing a checkpoint so that, whenever the job is killed, the last committed one is whole.

Every rank writes into ``step_N.tmp`` and syncs and hashes its own files; rank 0 gathers the hashes into the manifest,
renames the folder and writes the marker last. DeepSpeed alone does not do this: killed while one rank writes, it has
already declared the unfinished checkpoint the latest.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bgen.checkpoint import files
from bgen.distributed import world as ranks


class SaveError(RuntimeError):
    """A checkpoint could not be written; every rank raises it, and the earlier checkpoints are untouched."""


class Checkpoints:
    """The checkpoints of one run, in ``root`` on a file system that all ranks share.

    Parameters
    ----------
    root
        The run's ``checkpoints`` folder.
    keep
        Good checkpoints kept, at least 2.
    """

    def __init__(self, root: Path, keep: int) -> None:
        assert keep >= 2
        self.root = root
        self.keep = keep
        # Checkpoints whose files this process wrote or verified; others are verified before an older one is deleted.
        self._good: set[str] = set()

    def save(self, step: int, write: Callable[[Path], list[Path]], facts: dict[str, Any]) -> Path:
        """Write and commit the checkpoint after ``step`` steps; all ranks call it together.

        Parameters
        ----------
        step
            Optimiser steps done.
        write
            Called on every rank with the temporary folder; returns the files that this rank wrote.
        facts
            JSON values for the manifest, such as the number of ranks and the ZeRO stage.

        Raises
        ------
        SaveError
            On every rank, if one of them could not write.
        """
        target = self.root / files.folder_name(step)
        temporary = target.with_name(target.name + ".tmp")
        main = ranks.current().is_main
        self._together(lambda: self._prepare(temporary) if main else None, temporary)

        entries: dict[str, dict[str, Any]] = {}

        def write_and_hash() -> None:
            for path in write(temporary):
                files.sync(path)
                entries[path.relative_to(temporary).as_posix()] = {
                    "bytes": path.stat().st_size,
                    "sha256": files.sha256(path),
                }

        self._together(write_and_hash, temporary)
        parts = ranks.gather(entries)

        def commit() -> None:
            manifest = {
                "format": files.FORMAT,
                "step": step,
                **facts,
                "versions": {name: version(name) for name in ("torch", "deepspeed")}
                | {"python": platform.python_version()},
                "files": {name: entry for part in parts for name, entry in sorted(part.items())},
            }
            files.write_synced(temporary / files.MANIFEST, json.dumps(manifest, indent=1))
            for folder in {path.parent for path in temporary.rglob("*")}:
                files.sync(folder)
            if target.exists():
                files.remove(target)
            temporary.replace(target)
            files.sync(self.root)
            files.write_synced(target / files.MARKER, files.sha256(target / files.MANIFEST))
            files.sync(target)

        self._together(lambda: commit() if main else None, temporary)
        self._good.add(target.name)
        if main:
            self._retire()
        return target

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies on all ranks, and a line for each newer one that does not."""
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

    def _prepare(self, temporary: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for stale in self.root.glob("step_*.tmp"):
            shutil.rmtree(stale)
        temporary.mkdir()

    def _together(self, action: Callable[[], None], temporary: Path) -> None:
        """Run ``action`` on this rank; if it fails on any, clean up and raise on all."""
        failure = None
        try:
            action()
        except (OSError, RuntimeError) as error:
            failure = str(error).splitlines()[0] if str(error) else type(error).__name__
        failures = {rank: text for rank, text in enumerate(ranks.gather(failure)) if text is not None}
        if failures:
            if ranks.current().is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            rank, text = next(iter(failures.items()))
            free = shutil.disk_usage(self.root).free if self.root.exists() else 0
            raise SaveError(f"rank {rank} could not write {temporary}: {text} ({free / 1e9:.2f} GB free there)")

    def _retire(self) -> None:
        """Delete what is older than the newest ``keep`` good checkpoints."""
        good = 0
        for folder in files.committed(self.root):
            if good >= self.keep:
                files.remove(folder)
            elif folder.name in self._good or files.damage(folder) is None:
                self._good.add(folder.name)
                good += 1

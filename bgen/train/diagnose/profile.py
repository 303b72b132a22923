"""A window of steps under torch's profiler, as a file that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bgen.distributed.world import World
from bgen.track.progress import warn

STEPS = 3
"""Steps of a window."""


class ProfileWindow:
    """Records :data:`STEPS` steps of this rank into ``profile/rank_0.json`` of the run folder, each by its name.

    Parameters
    ----------
    first
        Number of the first step, from 1 on; 0: nothing is recorded.
    out
        The run folder.
    world
        This rank's place.
    event
        Adds a row to the record: what happened, and its values.
    """

    def __init__(self, first: int, out: Path, world: World, event: Callable[[str, dict[str, Any]], None]) -> None:
        self.first, self._event = first, event
        self.name = f"profile/rank_{world.rank}.json"
        self.file = out / self.name
        self._activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Say that the step of this number begins; one that is tried again begins again."""
        if self.first and step == self.first and self._profile is None:
            self._profile = profile(activities=self._activities, record_shapes=True, acc_events=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """Say that the step of this number is done; the last of the window writes the file."""
        if step >= self.first + STEPS - 1:
            self.close()

    def close(self) -> None:
        """Write what was recorded, also if the window is not full. A disk that takes no file does not end the run."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        part = self.file.with_suffix(".part")
        try:
            self.file.parent.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(part))
            part.replace(self.file)
        except (OSError, RuntimeError) as error:
            warn(f"{self.name} could not be written: {error}")
            return
        self._event("profile", {"file": self.name})


def record_step(number: int) -> torch.profiler.record_function:
    """Name a step in the profile."""
    return torch.profiler.record_function(f"step {number}")

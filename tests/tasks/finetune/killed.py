"""``killed.py RUN STEP SIGNAL ARGUMENTS...``: bgen that signals itself before a step of a fine-tuning's training."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

from bgen.cli import main as cli
from bgen.data.batch import CellBatch
from bgen.train.stages.course_in_memory import CourseStage
from bgen.train.stages.in_memory import MemoryStage

RUN, STEP, SIGNAL = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def end_in(stage: type[MemoryStage]) -> None:
    """Let a kind of stage send the signal when the batches of that step are drawn."""
    drawn = stage.train_batches

    def batches(self: MemoryStage, start_step: int) -> Iterator[Sequence[CellBatch]]:
        for step, found in enumerate(drawn(self, start_step), start_step):
            if self.config.out.name == RUN and step == STEP:
                os.kill(os.getpid(), SIGNAL)
            yield found

    stage.train_batches = batches  # type: ignore[method-assign]


if __name__ == "__main__":
    end_in(MemoryStage)
    end_in(CourseStage)
    sys.argv = ["bgen", *sys.argv[4:]]
    cli.main()

"""The tasks of fine-tuning, by the names of ``bgen finetune --task``."""

from __future__ import annotations

from typing import Any

from bgen.errors import UserError
from bgen.tasks.finetune.annotator import Annotate
from bgen.tasks.finetune.course import Time
from bgen.tasks.finetune.flow import Generate
from bgen.tasks.finetune.perturbation import Perturb
from bgen.tasks.finetune.request import MODES, Request
from bgen.tasks.finetune.task import Task

TASKS: dict[str, Task[Any]] = {
    "generate": Generate(),
    "annotate": Annotate(),
    "perturb": Perturb(),
    "time": Time(),
}


def task_of(request: Request) -> Task[Any]:
    """Return the task that is asked for.

    Raises
    ------
    UserError
        If there is none of that name, or its options do not fit.
    """
    if request.task not in TASKS or request.mode not in MODES:
        raise UserError(f"--task is one of {', '.join(TASKS)} and --mode one of {', '.join(MODES)}.")
    TASKS[request.task].require(request)
    return TASKS[request.task]

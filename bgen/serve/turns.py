"""Questions take turns, since each uses all cores; those that wait and are of one kind are answered together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from anndata import AnnData
from fastapi import Response
from starlette.requests import ClientDisconnect


@dataclass(eq=False)
class Task:
    """A question that waits.

    Attributes
    ----------
    work
        Answers it alone.
    render
        Makes the response of its answer; both run in a thread.
    gone
        Whether nobody waits for the answer any more.
    kind
        Tasks of an equal kind can be answered together; None: this one alone.
    asked
        What :attr:`together` is given of each.
    together
        Answers several, in order.
    cells
        How many it brings or asks for.
    """

    work: Callable[[], AnnData]
    render: Callable[[AnnData], Response]
    gone: Callable[[], Awaitable[bool]]
    kind: Hashable | None = None
    asked: Any = None
    together: Callable[[Sequence[Any]], Sequence[AnnData]] | None = None
    cells: int = 0
    answer: asyncio.Future[Response] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Turns:
    """Answers tasks in the order in which they come, each with those of its kind that wait.

    Parameters
    ----------
    most
        Cells that are answered together.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: list[Task] = []
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, task: Task) -> Response:
        """Wait for the turn of a task, and return its response; whatever its work raises is raised here."""
        self._waiting.append(task)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await task.answer
        finally:
            if task in self._waiting:
                self._waiting.remove(task)

    async def _work(self) -> None:
        while self._waiting:
            wanted = []
            for task in self._take():
                try:
                    left = await task.gone()
                except Exception:  # a connection that cannot even be asked
                    left = True
                if left:
                    _settle(task, ClientDisconnect())
                else:
                    wanted.append(task)
            if wanted:
                for task, told in zip(wanted, await asyncio.to_thread(_answers, wanted), strict=True):
                    _settle(task, told)

    def _take(self) -> list[Task]:
        """Take the first that waits, and those of its kind that come in with it."""
        first = self._waiting.pop(0)
        taken, cells = [first], first.cells
        if first.kind is not None:
            for task in list(self._waiting):
                if task.kind == first.kind and cells + task.cells <= self.most:
                    self._waiting.remove(task)
                    taken.append(task)
                    cells += task.cells
        return taken


def _answers(tasks: Sequence[Task]) -> list[Response | Exception]:
    """Answer tasks together; if that fails, each alone, so that one's mistake is not another's."""
    answers: Sequence[AnnData | None] = [None] * len(tasks)
    if len(tasks) > 1 and tasks[0].together is not None:
        try:
            answers = tasks[0].together([task.asked for task in tasks])
        except Exception:  # whose it is, each will say alone
            answers = [None] * len(tasks)
    return [_response(task, answer) for task, answer in zip(tasks, answers, strict=True)]


def _response(task: Task, answer: AnnData | None) -> Response | Exception:
    try:
        return task.render(task.work() if answer is None else answer)
    except Exception as error:
        return error


def _settle(task: Task, told: Response | Exception) -> None:
    if task.answer.done():  # it was cancelled
        return
    if isinstance(told, Exception):
        task.answer.set_exception(told)
    else:
        task.answer.set_result(told)

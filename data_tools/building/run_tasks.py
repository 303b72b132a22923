"""What runs the tasks of a build: this process, or the workers of a Dask cluster."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bgen.errors import UserError
from data_tools.building.partial import Interrupted

Task = Callable[..., object]
Done = Callable[[int, int], None]
"""Called with the work done and the work in all."""

START_SECONDS = 60
"""How long workers may take to start."""


class Runner(Protocol):
    """Does tasks, in any order."""

    def run(self, task: Task, arguments: Sequence[tuple[Any, ...]], work: Sequence[int], done: Done) -> None:
        """Call ``task(*a)`` for every ``a`` in ``arguments``, and report the ``work`` of the finished ones to ``done``.

        If one fails, its error is raised once no other is running.
        """


class InProcess:
    """One task after the other, here."""

    def run(self, task: Task, arguments: Sequence[tuple[Any, ...]], work: Sequence[int], done: Done) -> None:
        """See :class:`Runner`."""
        finished = 0
        for one, size in zip(arguments, work, strict=True):
            task(*one)
            finished += size
            done(finished, sum(work))


class OnDask:
    """On the workers of a Dask cluster, with a few tasks waiting at a time."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def run(self, task: Task, arguments: Sequence[tuple[Any, ...]], work: Sequence[int], done: Done) -> None:
        """See :class:`Runner`."""
        from distributed import KilledWorker, as_completed

        waiting = deque(zip(arguments, work, strict=True))
        sizes: dict[Any, int] = {}
        finished = 0
        running = as_completed()

        def start() -> None:
            one, size = waiting.popleft()
            future = self.client.submit(task, *one, pure=False)
            sizes[future.key] = size
            running.add(future)

        for _ in range(min(len(waiting), 2 * sum(self.client.nthreads().values()))):
            start()
        failure: BaseException | None = None
        for future in running:
            error = future.exception()
            if error is None:
                finished += sizes[future.key]
                done(finished, sum(work))
            elif failure is None:
                failure = error
            if waiting and failure is None:
                start()
        if isinstance(failure, KilledWorker):
            raise Interrupted(
                f"A worker of the build died again and again ({failure}). It may have run out of memory: use fewer"
                " --workers. The same command goes on where this one stopped."
            )
        if failure is not None:
            raise failure


@contextmanager
def open_runner(workers: int, scheduler: str | None, folder: Path) -> Iterator[Runner]:
    """Give a runner for the tasks of a build in ``folder``.

    Parameters
    ----------
    workers
        Processes of a cluster on this machine; 0: this process.
    scheduler
        Address of a running Dask scheduler to use instead, ``tcp://host:port``; its workers must see ``folder``.

    Raises
    ------
    UserError
        If the scheduler cannot be reached, or its workers do not see the folder or have no bgen.
    """
    if scheduler is None and workers == 0:
        yield InProcess()
        return
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=START_SECONDS)
        except (OSError, ValueError) as error:
            raise UserError(f"There is no Dask scheduler at {scheduler} ({error}).") from None
        with client:
            _check_workers(client, scheduler, folder)
            yield OnDask(client)
        return
    with (
        tempfile.TemporaryDirectory() as scratch,
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # what a task needs is bounded; a limit would stop workers for the page cache
            dashboard_address="127.0.0.1:0",  # any free port: two builds at once must not meet
            local_directory=scratch,
            silence_logs="ERROR",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield OnDask(client)


def _check_workers(client: Any, scheduler: str, folder: Path) -> None:
    try:
        client.wait_for_workers(1, timeout=START_SECONDS)
    except TimeoutError:
        raise UserError(f"The Dask scheduler at {scheduler} has no workers.") from None
    try:
        seen = client.run(sees, folder)
    except Exception as error:  # whatever a foreign worker says, most likely that it has no bgen
        raise UserError(f"The workers of {scheduler} cannot build stores: {error}. Is bgen installed there?") from None
    blind = [address for address, there in seen.items() if not there]
    if blind:
        raise UserError(f"Workers of {scheduler} do not see {folder}: {', '.join(blind)}. Use a shared file system.")


def sees(folder: Path) -> bool:
    """Whether a folder is there."""
    return folder.is_dir()

"""What runs the tasks of a build: this process, other processes of this machine, or the workers of a Dask cluster."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bgen.errors import UserError
from data_tools.building.partial import Interrupted

Task = Callable[..., object]
Done = Callable[[int, int], None]
"""Called with the work done and the work in all."""

DEATHS = 3
"""How often processes may die before a build stops."""

START_SECONDS = 60
"""How long workers may take to start."""

LOOK_SECONDS = 5
"""How often to look whether a Dask scheduler is still there."""


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


class InProcesses:
    """In other processes of this machine, which are reached through pipes: no port is opened.

    Tasks of a process that died are done again, by new processes, unless that happens :data:`DEATHS` times without one
    task done in between.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = self._start()

    def run(self, task: Task, arguments: Sequence[tuple[Any, ...]], work: Sequence[int], done: Done) -> None:
        """See :class:`Runner`."""
        waiting = deque(zip(arguments, work, strict=True))
        running: dict[Future[object], tuple[tuple[Any, ...], int]] = {}
        finished = deaths = 0
        failure: BaseException | None = None
        while running or (waiting and failure is None):
            broken = False
            while waiting and len(running) < 2 * self.workers and failure is None and not broken:
                try:
                    running[self._pool.submit(task, *waiting[0][0])] = waiting[0]
                    waiting.popleft()
                except BrokenProcessPool:
                    broken = True
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                one = running.pop(future)
                error = future.exception()
                if error is None:
                    finished, deaths = finished + one[1], 0
                    done(finished, sum(work))
                elif isinstance(error, BrokenProcessPool):
                    waiting.appendleft(one)
                    broken = True
                else:
                    failure = failure or error
            if broken:
                waiting.extendleft(one for one in running.values())  # the pool is lost as a whole
                running.clear()
                deaths += 1
                if deaths == DEATHS and failure is None:
                    failure = Interrupted(
                        "A worker of the build died again and again. It may have run out of memory: use fewer"
                        " --workers."
                    )
                self.close()
                self._pool = self._start()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End the processes; a task that is under way is ended too."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker
        )


def _prepare_worker() -> None:
    """Leave Ctrl-C to the build, and end when the build has ended, however that was."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="bgen-parent", daemon=True).start()


class OnDask:
    """On the workers of a Dask cluster, with a few tasks waiting at a time."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def run(self, task: Task, arguments: Sequence[tuple[Any, ...]], work: Sequence[int], done: Done) -> None:
        """See :class:`Runner`."""
        from distributed import KilledWorker

        failure = self._run(task, arguments, work, done)
        if isinstance(failure, KilledWorker):
            raise Interrupted(
                f"A worker of the build died again and again ({failure}). It may have run out of memory: use fewer."
            )
        if isinstance(failure, CancelledError) or (failure is not None and self.client.status != "running"):
            said = str(failure).partition("\n")[0]
            raise Interrupted(f"The Dask cluster was lost ({type(failure).__name__}: {said}).")
        if failure is not None:
            raise failure

    def _run(
        self, task: Task, arguments: Sequence[tuple[Any, ...]], work: Sequence[int], done: Done
    ) -> BaseException | None:
        """Run tasks and return the first error."""
        from distributed import wait as wait_for

        waiting = deque(zip(arguments, work, strict=True))
        running: dict[Any, int] = {}
        most = 2 * sum(self.client.nthreads().values())
        finished = 0
        failure: BaseException | None = None
        while running or (waiting and failure is None):
            while waiting and len(running) < most and failure is None:
                one, size = waiting.popleft()
                running[self.client.submit(task, *one, pure=False)] = size
            try:
                with self.client.as_current():
                    done_now = wait_for(list(running), timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                if self.client.status in ("closing", "closed"):  # the futures of a lost scheduler are never done
                    return CancelledError("its scheduler does not answer")
                continue
            except CancelledError as cancelled:
                return failure or cancelled
            for future in done_now:
                size = running.pop(future)
                error = future.exception()
                if error is None:
                    finished += size
                    done(finished, sum(work))
                failure = failure or error
        return failure


@contextmanager
def open_runner(workers: int, scheduler: str | None, folder: Path) -> Iterator[Runner]:
    """Give a runner for the tasks of a build in ``folder``.

    Parameters
    ----------
    workers
        Processes on this machine; 0: this process.
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
    if scheduler is None:
        processes = InProcesses(workers)
        try:
            yield processes
        finally:
            processes.close()
        return
    from distributed import Client

    try:
        # Not the default: one that finds no scheduler stays it, and every dask array of this process would wait for it.
        client = Client(scheduler, timeout=START_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(f"There is no Dask scheduler at {scheduler} ({error}).") from None
    with client:
        _check_workers(client, scheduler, folder)
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

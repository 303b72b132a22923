"""A thread that reads the batches of coming steps while the training loop computes."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

Batch = TypeVar("Batch")


def run_ahead(read: Callable[[int], list[Batch]], start: int, prefetch: int) -> Generator[list[Batch]]:
    """Yield ``read(start)``, ``read(start + 1)``, ... without end, at most ``prefetch`` steps read ahead."""
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(prefetch)
    stop = threading.Event()

    def work() -> None:
        step = start
        item: list[Batch] | BaseException
        while not stop.is_set():
            try:
                item = read(step)
            except BaseException as error:  # handed to the training loop, which raises it
                item = error
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    thread = threading.Thread(target=work, name="bgen-loader", daemon=True)
    thread.start()

    def finish() -> None:
        stop.set()
        thread.join()

    # an iterator that is still open when the interpreter ends would leave the thread in code that is gone
    atexit.register(finish)
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        atexit.unregister(finish)
        finish()

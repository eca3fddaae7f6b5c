"""Work ahead of the training: threads that read what comes next, and hand their errors on."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

from torchrec_compress.train.data.batch import Batch

_T = TypeVar("_T")
_POLL = 0.1  # seconds after which a waiting thread looks whether anybody still wants its work


def read_ahead(pool: Executor | None, tasks: Iterable[Callable[[], _T]], depth: int = 1) -> Iterator[_T]:
    """Yield what tasks return, in order, with `depth` more of them at work in the pool.

    Args:
        pool: where tasks run; None runs each when it is asked for.
        tasks: functions of no argument.
        depth: how many are under way while the caller uses a result.

    Raises:
        Exception: what a task raises, when its turn comes.

    Example:
        >>> list(read_ahead(None, [lambda: 1, lambda: 2]))
        [1, 2]
    """
    if pool is None:
        for task in tasks:
            yield task()
        return
    pending: deque[Future[_T]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def prefetch(batches: Iterator[Batch], depth: int = 2, pin_memory: bool = False) -> Iterator[Batch]:
    """Yield batches that a thread prepares ahead.

    Args:
        batches: drawn by the thread alone; closed when the caller stops.
        depth: batches that may wait.
        pin_memory: whether they are put into page-locked memory, for a GPU.

    Raises:
        Exception: what drawing a batch raises, after the batches before it.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=_POLL)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch.pin_memory() if pin_memory else batch)
                if stopped.is_set():
                    break
            put(None)
        except BaseException as error:  # noqa: BLE001 (it is raised again where the batches are used)
            put(error)
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()

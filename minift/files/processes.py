"""A map over chunks of items by a process for each processor core, in bounded memory."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def map_chunks(work: Callable[[list[Item]], Result], items: Iterator[Item], size: int) -> Generator[Result, None, None]:
    """Yield what `work` returns for each chunk of `size` items, in their order. Close the generator to end early.

    Raises what `work` and `items` raise, and OSError if a process is lost.
    """
    chunks: Iterator[list[Item]] = iter(lambda: [*islice(items, size)], [])
    first = next(chunks, [])
    # A few items are quicker done here; and elsewhere than on Linux, a process with threads cannot be forked safely.
    if len(first) < size or not sys.platform.startswith("linux"):
        yield from map(work, chain([first], chunks))
        return
    count = len(os.sched_getaffinity(0))
    forked = multiprocessing.get_context("fork")  # importing torch and reading a tokenizer would take seconds
    begun: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(count, forked, initializer=_start, initargs=(work,)) as processes:
        try:
            begun.append(_submit_first(processes, first))
            for chunk in chunks:
                begun.append(processes.submit(_work_on, chunk))
                if len(begun) > 2 * count:  # more would only fill the memory
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        except BrokenProcessPool:
            raise OSError("a process that encoded rows has ended: it was killed, or out of memory") from None


def _submit_first(processes: ProcessPoolExecutor, chunk: list) -> Future:
    """Submit the first chunk, which forks all processes.

    Signals wait meanwhile: Python loses an exception that a signal raises within a fork, and a new process in which
    `_start` has not run yet would be ended by the signal.
    """
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    try:
        return processes.submit(_work_on, chunk)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)


_work: Callable[[list], Any]  # of a process that `map_chunks` started


def _start(work: Callable[[list], Any]) -> None:
    """Prepare a process: `work` came with the fork; the process must end with the one that started it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes, and that one ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
    os._exit(1)


def _work_on(chunk: list) -> Any:
    return _work(chunk)

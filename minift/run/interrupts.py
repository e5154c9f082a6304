"""Ctrl-C (SIGINT) and SIGTERM: one line and an exit status; a training run finishes its step first."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from minift.run.ranks import RANK

Handler = Callable[[int, FrameType | None], Any]
NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def leave(number: int, frame: FrameType | None = None) -> None:
    """Exit at once, with one line and 128 + the signal's number. A signal handler."""
    os.write(2, f"{NAMES[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def on_signals(handler: Handler) -> None:
    """Handle both signals with `handler`, unless the process was started to ignore them (nohup, a background job)."""
    if threading.current_thread() is threading.main_thread():  # Python handles signals in no other thread
        for number in NAMES:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)


def interrupt_with(hint: str = "") -> Handler:
    """Return a handler that raises KeyboardInterrupt(number, message), which `cli.run_command` prints."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number, NAMES[signal.Signals(number)] + hint)

    return handler


@contextmanager
def deferred() -> Iterator[list[int]]:
    """Yield the list of the signals received so far, at most one: a second one ends the process at once.

    A thread reads them as they arrive: Python's own handlers would wait for the end of a backward pass.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def watch() -> None:
        """Note the first signal; end the process at the second."""
        while data := os.read(reading, 1):
            if data[0] in tuple(NAMES):
                if received:
                    leave(data[0])
                received.append(data[0])
                if RANK == 0:
                    os.write(2, b"\nfinishing this step, then saving; a second signal ends the run at once\n")
        os.close(reading)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handlers = {number: signal.getsignal(number) for number in NAMES}
    earlier = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    on_signals(lambda number, frame: None)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier)
        os.close(writing)

"""Handlers of the signals that ask a command to end: Ctrl-C, SIGTERM, and the SIGHUP of a closed terminal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from pipeline.console import drop_lost_outputs, print_line

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    Handler = Callable[[int, FrameType | None], object] | int | None

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest(KeyboardInterrupt):
    """Raised when a command has stopped at a safe point, as a person or the system asked."""


def set_handlers(handle: Callable[[int, FrameType | None], None]) -> None:
    """Set `handle` as the handler of each signal that asks a command to end; under nohup, SIGHUP stays ignored."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def exit_at_once(*_: object) -> NoReturn:
    """Exit with code 130 at once: the signal handler before a command begins and after its end."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


@contextmanager
def shield_children() -> Iterator[None]:
    """Block SIGTERM and SIGHUP in the processes that the body starts, and keep the handlers of this one.

    A signal to the process group then reaches this process alone, which ends the others. Call it on the main thread.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class StopSignals:
    """Signal handler: the first signal asks for a stop at the next safe point, the second stops at once."""

    def __init__(self, stop_file: Path):
        self.stop_file = stop_file  # tells the workers
        self._asked = threading.Event()
        self._before: dict[int, Handler] = {}

    def is_requested(self) -> bool:
        return self._asked.is_set()

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        set_handlers(self._handle)
        return self

    def _handle(self, *_: object) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()
        self.stop_file.touch()
        drop_lost_outputs()
        with suppress(OSError, RuntimeError):  # the signal may have interrupted a print
            print_line("stopping at the next safe point; a second signal (Ctrl-C) stops at once")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.stop_file.unlink(missing_ok=True)

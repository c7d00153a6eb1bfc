"""Handling of Ctrl-C and SIGTERM: stop at a safe point."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from pipeline.console import print_line

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest(KeyboardInterrupt):
    """Raised when a command has stopped at a safe point, as a person or the system asked."""


class StopSignals:
    """Signal handler: the first signal asks for a stop at the next safe point, the second stops at once."""

    def __init__(self, stop_file: Path):
        self.stop_file = stop_file  # tells the workers
        self._asked = threading.Event()
        self._before: dict[int, Any] = {}

    def is_requested(self) -> bool:
        """Return whether a signal has come."""
        return self._asked.is_set()

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def install(self) -> None:
        """Set the handlers; also after ray.init, which replaces them."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()
        self.stop_file.touch()
        print_line("stopping at the next safe point; once more to stop at once")

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.stop_file.unlink(missing_ok=True)

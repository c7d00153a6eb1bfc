"""What a person sees while work is under way: a bar on a terminal, plain dated lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

LINE_SECONDS = 15.0


class Bar(Protocol):
    def update(self, done: int, note: str = "") -> None: ...


def say(text: str) -> None:
    """One line of output: dated where nobody watches."""
    stamp = "" if sys.stdout.isatty() else time.strftime("%Y-%m-%d %H:%M:%S  ")
    print(f"{stamp}{text}", flush=True)


def duration(seconds: float) -> str:
    """'1 h 05 min', '3 min 20 s', '4.2 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60):02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def pace_of(rate: float) -> str:
    """'23,700/s', '13.3/s', '3.1/min', '0.4/h'."""
    number, unit = next(
        ((rate * n, u) for n, u in ((1, "s"), (60, "min")) if rate * n >= 1), (rate * 3600, "h")
    )
    return f"{number:,.0f}/{unit}" if number >= 100 else f"{number:.3g}/{unit}"


@contextmanager
def bar(stage: str, total: int, unit: str, start: int = 0) -> Iterator[Bar]:
    """Progress of one stage from `start` to `total` units ('steps', 'images')."""
    if sys.stdout.isatty():
        with _terminal_bar(stage, total, unit, start) as shown:
            yield shown
    else:
        yield _Lines(stage, total, unit, start)


class _Speed:
    """Units per second. Where units are small the pace is the one since the first were done: what came before was
    starting up. Where they are large several end together, and only the whole time tells."""

    SMALL = 1 / 10  # of what is done: the first that were

    def __init__(self, start: int) -> None:
        self.began, self.start = time.monotonic(), start
        self.first: tuple[float, int] | None = None

    def at(self, done: int) -> float | None:
        """The pace now; None as long as it cannot be told."""
        now = time.monotonic()
        if self.first is None and done > self.start:
            self.first = now, done
        if self.first is None or done == self.first[1]:
            return None
        then, first = self.first
        small = first - self.start <= self.SMALL * (done - self.start)
        since, units = (then, done - first) if small else (self.began, done - self.start)
        return units / max(now - since, 1e-9)


class _Lines:
    """At most one line every LINE_SECONDS, and one at the end."""

    def __init__(self, stage: str, total: int, unit: str, start: int):
        self.stage, self.total, self.unit, self.start = stage, total, unit, start
        self.last_line, self.last = time.monotonic(), (start, "")
        self.speed = _Speed(start)

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        rate = self.speed.at(done)
        if (done, note) == self.last or (done < self.total and now - self.last_line < LINE_SECONDS):
            return
        self.last_line, self.last = now, (done, note)
        pace = f", {pace_of(rate)}" if rate else ""
        left = f", {duration((self.total - done) / rate)} left" if rate and done < self.total else ""
        say(f"{self.stage}: {done}/{self.total} {self.unit}{pace}{left}{note and ', ' + note}")


@contextmanager
def _terminal_bar(stage: str, total: int, unit: str, start: int) -> Iterator[Bar]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, redirect_stderr=False) as progress:
        task = progress.add_task(stage, total=total, completed=start, rate="", note="")
        yield _Terminal(progress, task, start)


class _Terminal:
    def __init__(self, progress, task, start: int):
        self.progress, self.task = progress, task
        self.speed = _Speed(start)

    def update(self, done: int, note: str = "") -> None:
        rate = self.speed.at(done)
        shown = pace_of(rate) if rate else ""
        self.progress.update(self.task, completed=done, rate=shown, note=note)


@contextmanager
def following(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every half second beside the body, and once after it."""

    def follow(over: threading.Event) -> None:
        while not over.wait(0.5):
            look()

    try:
        with beside(follow):
            yield
    finally:
        look()


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread of its own beside the body. It is told when the body is over, and waited for."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

"""Terminal output: progress bars, tables, and dated lines if the output is no terminal."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 15.0
SMALL = 1 / 10  # of the total: if a unit is no larger, the rate is computed from finished units alone


def print_line(text: str) -> None:
    """Print one line, with date and time if the output is no terminal."""
    stamp = "" if sys.stdout.isatty() else time.strftime("%Y-%m-%d %H:%M:%S  ")
    print(f"{stamp}{text}", flush=True)


def drop_lost_outputs() -> None:
    """Discard further output if nobody reads it: the terminal was closed, or Ctrl-C has ended `| tee` too."""
    outputs = select.poll()
    for stream in (1, 2):
        outputs.register(stream, 0)
    for stream, _ in outputs.poll(0):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def format_duration(seconds: float) -> str:
    """Return seconds as '1 h 05 min', '3 min 20 s', '4.2 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_rate(rate: float) -> str:
    """Return a rate as '23,700/s', '13.3/s', '3.1/min', '0.4/h'."""
    unit, seconds = next((pair for pair in (("s", 1), ("min", 60)) if rate * pair[1] >= 1), ("h", 3600))
    number = rate * seconds
    return f"{number:,.0f}/{unit}" if number >= 100 else f"{number:.3g}/{unit}"


def format_table(headings: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> str:
    """Return a table as text, at most as wide as the terminal; the first column is never cut."""
    import shutil

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        *headings,
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.columns[0].no_wrap = True
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*row)
    console = Console(width=shutil.get_terminal_size().columns, markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


class ProgressBar:
    """Progress of one stage from `start` to `total` items; without a terminal, a line every LINE_SECONDS at most."""

    def __init__(self, stage: str, total: int, unit: str, start: int, terminal: Progress | None = None):
        self.stage, self.total, self.unit, self.start, self.terminal = stage, total, unit, start, terminal
        self.began = self.last_line = time.monotonic()
        self.last = (start, "")
        self.first: tuple[float, int] | None = None  # when the first units were done, and how many
        if terminal:
            self.task = terminal.add_task(stage, total=total, completed=start, rate="", note="")

    def update(self, done: int, note: str = "") -> None:
        """Set the number of finished items; `note` is shown after it."""
        now = time.monotonic()
        rate = self._compute_rate(done, now)
        if self.terminal:
            self.terminal.update(self.task, completed=done, rate=format_rate(rate) if rate else "", note=note)
        elif (done, note) != self.last and (done >= self.total or now - self.last_line >= LINE_SECONDS):
            self.last_line, self.last = now, (done, note)
            pace = f", {format_rate(rate)}" if rate else ""
            if rate and done < self.total:
                pace += f", {format_duration((self.total - done) / rate)} left"
            print_line(f"{self.stage}: {done}/{self.total} {self.unit}{pace}{note and ', ' + note}")

    def _compute_rate(self, done: int, now: float) -> float | None:
        """Compute items per second; None before it is known.

        Small items count from the first finished one, without the start-up. Of large ones, several end together.
        """
        if self.first is None and done > self.start:
            self.first = now, done
        then, first = self.first or (now, done)
        if done == first:
            return None
        small = first - self.start <= SMALL * (done - self.start)
        since, units = (then, done - first) if small else (self.began, done - self.start)
        return units / max(now - since, 1e-9)


@contextmanager
def show_progress(stage: str, total: int, unit: str, start: int = 0) -> Iterator[ProgressBar]:
    """Show the progress of one stage from `start` to `total` items ('steps', 'images') during the body."""
    if not sys.stdout.isatty():
        yield ProgressBar(stage, total, unit, start)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("[bold]{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        redirect_stderr=False,
    ) as progress:  # fmt: skip
        yield ProgressBar(stage, total, unit, start, progress)


@contextmanager
def poll_in_thread(poll: Callable[[], None]) -> Iterator[None]:
    """Call `poll` in a thread every half second inside the context, and once after it."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.5):
            poll()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        poll()

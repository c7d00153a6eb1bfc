"""The training log log.jsonl: its writer and its readers.

A line is {"step": .., "time": Unix milliseconds, "metrics": {name: value}}. The last line may be half written,
others may be damaged; readers skip them. A resumed run computes some steps again, bit for bit; their points are in the
file already and keep their first timestamps, so that no tracking server ever sees one twice.
"""

import json
import os
import statistics
import time
from contextlib import suppress
from pathlib import Path

from typing_extensions import TypedDict

from pipeline.errors import PipelineError
from pipeline.store.files import parse_json, require_regular_file, translate_write_errors, warn_once
from pipeline.store.run import Place

TAIL = 2000  # bytes; a line is some 300
RECENT = 20  # points by which the speed is judged
SLOW = 1.3  # times the fastest rank's step


class LogPoint(TypedDict):
    step: int
    time: int
    metrics: dict[str, float]


class LogWriter:
    """Writer of the training log, each step once, and of the heartbeat: log points can be minutes apart."""

    def __init__(self, place: Place):
        self.path, self.heartbeat, self.last_beat = (path := place.log), place.heartbeat, 0.0
        with translate_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                os.truncate(path, find_last_line_end(path))  # a torn line
        last = read_last_point(path)
        self.last_step = last["step"] if last else -1

    def beat(self, step: int) -> None:
        """Write the current step to the heartbeat, at most once a second."""
        if time.monotonic() - self.last_beat > 1:
            self.last_beat = time.monotonic()
            with suppress(OSError):  # a full disk ends training elsewhere, where results would be lost
                self.heartbeat.write_text(str(step))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if step <= self.last_step:
            return
        self.last_step = step
        point = {"step": step, "time": time.time_ns() // 1_000_000, "metrics": metrics}
        with translate_write_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")


def read_points(path: Path, start: int = 0, end: int | None = None) -> list[LogPoint]:
    """Return the points between two byte offsets, by default all; none without a file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(start)
        content = file.read(-1 if end is None else end - start)
    lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
    points = [point for line in lines if (point := _parse_point(line))]
    if len(points) < len(lines):
        warn_once(f"{path}: {len(lines) - len(points)} lines are damaged and skipped")
    return points


def _parse_point(line: bytes) -> LogPoint | None:
    with suppress(PipelineError):
        return parse_json(line, LogPoint, "a line")
    return None


def find_last_line_end(path: Path, start: int = 0, most: int = -1) -> int:
    """Return the byte offset after the last complete line of `most` bytes (-1: all) from `start`; 0 without a file."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        start = 0 if start > file.seek(0, os.SEEK_END) else start
        file.seek(start)
        return start + file.read(most).rfind(b"\n") + 1


def read_last_point(path: Path) -> LogPoint | None:
    """Return the point of the last complete line, without reading the others."""
    try:
        with require_regular_file(path).open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return None
    points = (_parse_point(line) for line in reversed(lines) if line.endswith(b"}\n"))
    return next(filter(None, points), None)


def describe_slow_rank(points: list[LogPoint]) -> str:
    """Describe the rank that is clearly slower than another in most of the last points; '' if there is none."""
    recent = [metrics for p in points[-RECENT:] if "train/slowest_rank" in (metrics := p["metrics"])]
    if not recent:
        return ""
    slowest = int(statistics.mode(metrics["train/slowest_rank"] for metrics in recent))
    own = [metrics for metrics in recent if metrics["train/slowest_rank"] == slowest]
    low, high = (statistics.median(m[f"train/step_seconds_{name}"] for m in own) for name in ("min", "max"))
    if 2 * len(own) <= len(recent) or high < SLOW * low:
        return ""
    where = f"all wait for it (logs/rank-{slowest}.log names its host)"
    return f"rank {slowest} takes {high:.2g} s of its own for a step, the fastest {low:.2g} s: {where}"


def read_progress(place: Place) -> tuple[int, float | None]:
    """Return the current step of training, and the last logged loss."""
    point = read_last_point(place.log)
    step, loss = (point["step"], point["metrics"].get("train/loss")) if point else (0, None)
    try:
        return max(step, int(place.heartbeat.read_text())), loss
    except (OSError, ValueError):  # none yet, or just being written
        return step, loss

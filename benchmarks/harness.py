"""Contenders measured in turns in one process: medians, spread and ratios that share the machine's moods."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

LIBRARIES = (
    "torch", "numpy", "diffusers", "denoising-diffusion-pytorch", "webdataset", "torch-fidelity", "ray", "mlflow",
)  # fmt: skip
OURS = "ddpm"  # how the names of this project's own contenders begin
FLOOR = "floor"  # the same products alone: nobody's contender


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark, from its command line.

    rounds: measured turns of each contender; quick: fewer and smaller cases; cpu_clock: seconds of this process's
    CPU time instead of the wall's, for a machine that others use too (one thread); deadline: of time.monotonic(),
    after which no contender is taken on.
    """

    device: torch.device
    quick: bool
    rounds: int
    data: Path | None = None
    cpu_clock: bool = False
    deadline: float = float("inf")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Contender:
    """`call` does `items` pieces of work."""

    name: str
    call: Callable[[], Any]
    items: float


@dataclass(frozen=True)
class Row:
    """One line of the table.

    value in `unit`; spread: interquartile range over the median; ratio: this value over that of `against`,
    None where there is nothing to compare.
    """

    case: str
    contender: str
    value: float
    unit: str
    spread: float | None = None
    ratio: float | None = None
    against: str = ""


@dataclass
class Outcome:
    """Result of a benchmark: rows, and what it left out with the reason."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class Skipped(Exception):
    """A contender or benchmark that this machine cannot run, and why."""


def race(
    case: str, contenders: Sequence[Contender], settings: Settings, unit: str, against: str = ""
) -> list[Row]:
    """Each contender once per round, in turns, after one call to warm up; ratios over contender `against`.

    A contender that fails raises; a call shorter than 0.1 s on a GPU is repeated within its turn.
    """
    repeats = {one.name: _repeats(one, settings) for one in contenders}
    rates: dict[str, list[float]] = {one.name: [] for one in contenders}
    for _ in range(settings.rounds):
        for one in contenders:
            seconds = _seconds(one, repeats[one.name], settings)
            rates[one.name].append(one.items * repeats[one.name] / seconds)
    base = median(rates[against]) if against in rates else None
    return [
        Row(case, name, median(found), unit, _spread(found), median(found) / base if base else None, against)
        for name, found in rates.items()
    ]


def _repeats(one: Contender, settings: Settings) -> int:
    _seconds(one, 1, settings)  # allocations, compilation, autotuning
    return max(1, round(0.1 / _seconds(one, 1, settings))) if settings.on_gpu else 1


def _seconds(one: Contender, repeats: int, settings: Settings) -> float:
    clock = time.process_time if settings.cpu_clock else time.perf_counter
    _wait(settings)
    start = clock()
    for _ in range(repeats):
        one.call()
    _wait(settings)
    return clock() - start


def _wait(settings: Settings) -> None:
    if settings.on_gpu:
        torch.cuda.synchronize(settings.device)


def _spread(found: Sequence[float]) -> float | None:
    if len(found) < 3:
        return None
    low, _, high = quantiles(found, n=4, method="inclusive")
    return (high - low) / median(found)


def offered(outcome: Outcome, *makers: Callable[[], list[Contender]]) -> list[Contender]:
    """Return what the makers give; one that raises Skipped or lacks its library is noted instead."""
    found: list[Contender] = []
    for make in makers:
        try:
            found += make()
        except Skipped as reason:
            _note(outcome, str(reason))
        except ImportError as error:
            _note(outcome, f"{error.name} is not installed")
    return found


def _note(outcome: Outcome, reason: str) -> None:
    if reason not in outcome.skipped:
        outcome.skipped.append(reason)


def machine(settings: Settings) -> dict[str, Any]:
    """Hardware, versions and how busy the machine is at this moment."""
    load = [round(x, 1) for x in os.getloadavg()]
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": load,
        "platform": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }
    if settings.on_gpu:
        facts["gpu"] = torch.cuda.get_device_name(settings.device)
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags.split()]
    return f"{names[0] if names else platform.processor()} ({', '.join(units)})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(outcomes: dict[str, Outcome]) -> str:
    """All rows as one aligned table, then what was left out."""
    head = ("benchmark", "case", "contender", "value", "unit", "spread", "ratio")
    lines = [head, *[_cells(name, row) for name, outcome in outcomes.items() for row in outcome.rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = "\n".join(_line(line, widths) for line in lines)
    for name, outcome in outcomes.items():
        text += "".join(f"\n{name}: left out: {reason}" for reason in outcome.skipped)
    return text


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()


def _cells(name: str, row: Row) -> tuple[str, ...]:
    spread = "" if row.spread is None else f"{row.spread:.0%}"
    itself = row.contender == row.against
    ratio = "" if row.ratio is None or itself else f"{row.ratio:.2f} x {row.against}"
    return (name, row.case, row.contender, f"{row.value:.4g}", row.unit, spread, ratio)


def as_json(outcomes: dict[str, Outcome], facts: dict[str, Any]) -> dict[str, Any]:
    return {"machine": facts, "benchmarks": {name: asdict(outcome) for name, outcome in outcomes.items()}}

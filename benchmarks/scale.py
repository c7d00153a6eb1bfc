"""One worker and two, and what the orchestration costs: real commands in a temporary storage root."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.harness import OURS, Outcome, Row, Settings, Skipped

# Next to nothing to compute, so that what is around it shows.
SMALL = ("train.steps=20", "train.batch_size=16", "sample.num_images=64", "sample.steps=2", "diffusion.timesteps=20",
         "evaluate.nll_images=2", "figures.which=[samples]")  # fmt: skip
# What decides how much a stage handles, less and more of it: 2 and 120 shards, steps, images.
SIZES = {
    "shard": ("data.images_per_shard", 1500, 15),
    "train": ("train.steps", 20, 400),
    "sample": ("sample.num_images", 64, 2048),
}


def run(settings: Settings) -> Outcome:
    outcome = Outcome()
    try:
        outcome.rows += _orchestration()
        outcome.rows += _sizes()
        if settings.on_gpu:
            raise Skipped("1 and 2 workers: measured on CPUs only")
        outcome.rows += _workers(settings)
    except Skipped as reason:
        outcome.skipped.append(str(reason))
    return outcome


def _orchestration() -> list[Row]:
    """The digits run through Ray against the same run in one process."""
    rows = []
    for name, workers in ((f"{OURS} with Ray, 2 workers", 2), (f"{OURS} in one process", 0)):
        with tempfile.TemporaryDirectory(prefix="bench-") as root:
            seconds = _command(root, "run", "digits", *SMALL, f"cluster.workers={workers}")
            rows.append(Row("digits run with almost no computing", name, seconds, "s"))
    return rows


def _sizes() -> list[Row]:
    """Seconds of a stage in one process, at two sizes: whether its cost grows faster than its work."""
    rows = []
    for stage, (key, *values) in SIZES.items():
        for value in values:
            with tempfile.TemporaryDirectory(prefix="bench-") as root:
                _command(root, stage, "digits", *SMALL, f"{key}={value}", "cluster.workers=0")
                seconds = _timings(root)[stage]
            rows.append(Row(f"digits, {stage} alone", f"{OURS}: {key}={value}", seconds, "s"))
    return rows


def _workers(settings: Settings) -> list[Row]:
    """Images per second of each stage: one worker with one core, two with one each."""
    steps, samples, bounds = (20, 256, 50) if settings.quick else (60, 512, 100)
    shape = ("model.channels=64", "model.dropout=0.0", "train.batch_size=64", "train.log_every=5", "sample.steps=50",
             "sample.batch_size=32", "evaluate.metrics=[nll]", "evaluate.nll_batch_size=10",
             "evaluate.nll_timesteps=null",
             f"train.steps={steps}", f"sample.num_images={samples}", f"evaluate.nll_images={bounds}")  # fmt: skip
    rates: dict[str, dict[int, float]] = {"train": {}, "sample": {}, "evaluate": {}}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory(prefix="bench-") as root:
            common = (*shape, f"cluster.workers={workers}", "cluster.cpus_per_worker=1")
            _command(root, "sample", "digits", *common, cores=workers)
            _command(root, "evaluate", "digits", *common, cores=workers)
            log = next(Path(root).glob("*/log.jsonl")).read_text().splitlines()
            points = [json.loads(line)["metrics"]["train/images_per_second"] for line in log]
            rates["train"][workers] = median(points[1:])
            rates["sample"][workers] = samples / _timings(root)["sample"]
            rates["evaluate"][workers] = bounds / _timings(root)["evaluate"]
    return [
        Row(f"{stage}, digits at width 64", f"{workers} worker{'s' * (workers > 1)} of one core", rate, "images/s",
            None, rate / found[1], "1 worker of one core")
        for stage, found in rates.items()
        for workers, rate in found.items()
    ]  # fmt: skip


def _timings(root: str) -> dict[str, float]:
    """Seconds of each stage."""
    return json.loads(next(Path(root).glob("digits-*/timings.json")).read_text())


def _command(root: str, *words: str, cores: int | None = None) -> float:
    """Seconds of `ddpm WORDS`; on so many cores only."""
    command = [sys.executable, "-m", "pipeline", *words, f"cluster.storage={root}"]
    if cores:
        wanted = sorted(os.sched_getaffinity(0))[:cores]
        command = ["taskset", "-c", ",".join(map(str, wanted)), *command]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Skipped(
            f"'{' '.join(words[:2])}' failed: {(done.stderr.strip().splitlines() or [''])[-1][:160]}"
        )
    return time.perf_counter() - began

"""`ddpm reproduce`: the paper's tables as one study, scaled down to a budget.

A budget shortens every row alike: training steps, samples and NLL images by the same share, so the rows stay
comparable with each other, and by nothing but their order with the paper.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import ClusterConfig, Experiment
from pipeline.console import print_line
from pipeline.engine import find
from pipeline.errors import ConfigError
from pipeline.store.files import read_json, write_json
from pipeline.store.log import read_points
from pipeline.store.run import locate_study
from pipeline.sweep.definition import Values, load_sweep
from pipeline.sweep.points import format_overrides, list_points

if TYPE_CHECKING:
    from pipeline.sweep.study import Study

SWEEPS = {"cifar10": "table2"}  # what can be reproduced: the sweep file of its rows
TEST_IMAGES = 10_000
FORWARD_AND_BACKWARD = 3  # a training image costs about three forward passes
SHORT = 20_000  # steps below which a constant EMA would still hold its first weights
LEAST_SAMPLES, LEAST_BOUNDS = 64, 16
WARM_UP = 20  # at most so large a part of a run is warm-up; the authors' is 1/160
PROBE_STEPS = 20


def parse_budget(text: str) -> tuple[int | None, float | None]:
    """Read '2000', '2h', '30min' or 'full': steps of each row, or hours for all rows together, or neither, which is
    the paper's length. Raises ConfigError."""
    if text == "full":
        return None, None
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)(h|min)", text)
    if not match or float(match[1] or match[2]) == 0:
        raise ConfigError(f"--budget {text}: say a number of steps (2000), a time (2h, 30min), or full")
    return (int(match[1]), None) if match[1] else (None, float(match[2]) / (1 if match[3] == "h" else 60))


def plan_reproduction(
    target: str, text: str, shared: list[str], cluster: ClusterConfig, dry_run: bool = False
) -> Study:
    """Make one study of the rows of the paper's tables, of the length that `--budget` says.

    Where that is a time, the rate of training is measured once, unless this is a dry run. Raises ConfigError,
    PipelineError.
    """
    steps, hours = parse_budget(text)
    sweep = load_sweep(SWEEPS[target], [])
    rows = [point.experiment for point in list_points(sweep, shared)]
    from pipeline.sweep.study import Study  # brings torch, which a wrong override is told without

    name = f"reproduce_{target}" + ("" if text == "full" else f"-{text}")
    steps = steps or rows[0].train.steps
    if hours is not None:
        memory = locate_study(find.prepare_storage_root(cluster), name) / "budget.json"
        if dry_run and not memory.exists():
            note = f"how many steps of {steps:,} fit into {text} is measured at the start"
            return Study(replace(sweep, name=name, note=note), list_points(sweep, shared), cluster)
        steps = load_or_measure_steps(memory, hours, rows, cluster)
    sweep = replace(sweep, name=name, note=describe_scale(steps, rows[0]))
    return Study(sweep, list_points(sweep, [*scale_keys(steps, rows[0]), *shared]), cluster)


def load_or_measure_steps(memory: Path, hours: float, rows: list[Experiment], cluster: ClusterConfig) -> int:
    """Return the steps that an earlier command settled on, so that the same command again is the same study."""
    if not memory.exists():
        from pipeline.engine import execute as stages

        print_line("measuring how fast this cluster trains")
        train = replace(
            rows[0].train, steps=PROBE_STEPS, warmup_steps=1, log_every=PROBE_STEPS // 4, sample_every=0
        )
        place = stages.run_stages(replace(rows[0], name="probe", train=train), cluster, "train")
        # the best window, since the first ones warm up
        rate = max(point["metrics"]["train/images_per_second"] for point in read_points(place.log))
        write_json(memory, {"steps": fit_steps(hours, rate, rows)})
    return int(read_json(memory)["steps"])


def fit_steps(hours: float, images_per_second: float, rows: list[Experiment]) -> int:
    """Return how many steps each row can have, at the rate at which the whole cluster trains.

    Everything else is projected from that rate: a forward pass is a third of a training image.
    """
    passes = sum(map(count_passes, rows))
    share = hours * 3600 * FORWARD_AND_BACKWARD * images_per_second / passes
    return max(1, int(min(1.0, share) * rows[0].train.steps))


def count_passes(experiment: Experiment) -> float:
    """Return what a run costs, in forward passes of one image: training, samples, bound."""
    timesteps = experiment.diffusion.timesteps
    train = FORWARD_AND_BACKWARD * experiment.train.steps * experiment.train.batch_size
    samples = experiment.sample.num_images * (experiment.sample.steps or timesteps)
    return train + samples + (experiment.evaluate.nll_images or TEST_IMAGES) * timesteps


def scale_keys(steps: int, full: Experiment) -> list[str]:
    """Return the overrides that make a row of the paper's length one of `steps`: every key that is scaled."""
    share = steps / full.train.steps
    if share >= 1:
        return []
    samples = max(LEAST_SAMPLES, round(share * full.sample.num_images))
    bounds = max(LEAST_BOUNDS, round(share * (full.evaluate.nll_images or TEST_IMAGES)))
    values: Values = {
        "train.steps": steps,
        "train.warmup_steps": min(full.train.warmup_steps, max(1, steps // WARM_UP)),
        "train.checkpoint_every": min(full.train.checkpoint_every, max(1, steps // 4)),
        "train.sample_every": min(full.train.sample_every, max(1, steps // 4)),
        "train.log_every": min(full.train.log_every, max(1, steps // 20)),
        "train.ema_warmup": full.train.ema_warmup or steps < SHORT,
        "sample.num_images": samples,
        "evaluate.nll_images": bounds,
        "sample.batch_size": min(full.sample.batch_size, samples),
        "evaluate.nll_batch_size": min(full.evaluate.nll_batch_size, bounds),
    }
    return format_overrides(values)


def describe_scale(steps: int, full: Experiment) -> str:
    """Say what a reader has to know of a study that is shorter than the paper's."""
    share = steps / full.train.steps
    if share >= 1:
        return "at the paper's length"
    return (
        f"scaled down to {100 * share:.2g} % of the paper's length ({steps:,} of {full.train.steps:,} steps, samples "
        "and NLL images by the same share): the rows can be held against each other, not against the paper's values"
    )

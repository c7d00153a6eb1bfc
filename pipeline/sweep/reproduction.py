"""`ddpm reproduce`: the paper's tables as one study, scaled down to a budget.

Every row is shortened by one share: rows stay comparable with each other, and by their order with the paper.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

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
    """Parse '2000' (steps of each row), '2h' or '30min' (time for all rows), or 'full': return steps, hours.

    Raises ConfigError.
    """
    if text == "full":
        return None, None
    match = re.fullmatch(r"([0-9]{1,9})|([0-9]{1,6}(?:\.[0-9]{1,6})?)(h|min)", text)
    if not match or float(match[1] or match[2]) == 0:
        raise ConfigError(f"--budget {text}: give a number of steps (2000), a time (2h, 30min), or full")
    return (int(match[1]), None) if match[1] else (None, float(match[2]) / (1 if match[3] == "h" else 60))


class BudgetFile(TypedDict):
    steps: int


def plan_reproduction(
    target: str, text: str, shared: list[str], cluster: ClusterConfig, dry_run: bool
) -> "Study":
    """Return the study that trains every row of the paper's tables within the budget.

    For a time the rate of training is measured once, unless this is a dry run. Raises ConfigError, PipelineError.
    """
    steps, hours = parse_budget(text)
    sweep = load_sweep(SWEEPS[target], [])
    rows = [point.experiment for point in list_points(sweep, shared)]
    from pipeline.sweep.study import Study  # after the checks: it loads torch

    name = f"reproduce_{target}" + ("" if text == "full" else f"-{text}")
    steps = steps or rows[0].train.steps
    if hours is not None:
        memory = locate_study(find.prepare_storage_root(cluster), name) / "budget.json"
        if dry_run and not memory.exists():
            note = f"how many steps of {steps:,} fit into {text} is measured at the start"
            return Study(replace(sweep, name=name, note=note), list_points(sweep, shared), cluster)
        if not memory.exists():  # the same command again is the same study
            passes = hours * 3600 * FORWARD_AND_BACKWARD * measure_rate(rows[0], cluster)
            share = min(1.0, passes / sum(map(count_passes, rows)))
            write_json(memory, {"steps": max(1, int(share * steps))})
        steps = read_json(memory, BudgetFile, "delete it to measure again")["steps"]
    scaled, note = scale_experiment(steps, rows[0])
    return Study(replace(sweep, name=name, note=note), list_points(sweep, [*scaled, *shared]), cluster)


def measure_rate(row: Experiment, cluster: ClusterConfig) -> float:
    """Return the training images per second of the whole cluster, from a run of a few steps."""
    from pipeline.engine import execute as stages

    print_line("measuring how fast this cluster trains")
    train = replace(row.train, steps=PROBE_STEPS, warmup_steps=1, log_every=PROBE_STEPS // 4, sample_every=0)
    place = stages.run_stages(replace(row, name="probe", train=train), cluster, "train")
    # the fastest window, since the first ones are slower
    return max(point["metrics"]["train/images_per_second"] for point in read_points(place.log))


def count_passes(experiment: Experiment) -> float:
    """Count the forward passes of one image in a run: training, samples, bound."""
    timesteps = experiment.diffusion.timesteps
    train = FORWARD_AND_BACKWARD * experiment.train.steps * experiment.train.batch_size
    samples = experiment.sample.num_images * (experiment.sample.steps or timesteps)
    return train + samples + (experiment.evaluate.nll_images or TEST_IMAGES) * timesteps


def scale_experiment(steps: int, full: Experiment) -> tuple[list[str], str]:
    """Return the overrides that shorten a run to `steps` steps, and a note for readers."""
    share, train = steps / full.train.steps, full.train
    if share >= 1:
        return [], "at the paper's length"
    samples = max(LEAST_SAMPLES, round(share * full.sample.num_images))
    bounds = max(LEAST_BOUNDS, round(share * (full.evaluate.nll_images or TEST_IMAGES)))
    values: Values = {
        "train.steps": steps,
        "train.warmup_steps": min(train.warmup_steps, max(1, steps // WARM_UP)),
        "train.checkpoint_every": min(train.checkpoint_every, max(1, steps // 4)),
        "train.sample_every": min(train.sample_every, max(1, steps // 4)),
        "train.log_every": min(train.log_every, max(1, steps // 20)),
        "train.ema_warmup": train.ema_warmup or steps < SHORT,
        "sample.num_images": samples,
        "sample.checkpoint": "last",
        "evaluate.checkpoints": None,
        "evaluate.nll_images": bounds,
        "sample.batch_size": min(full.sample.batch_size, samples),
        "evaluate.nll_batch_size": min(full.evaluate.nll_batch_size, bounds),
    }
    return format_overrides(values), (
        f"scaled down to {100 * share:.2g} % of the paper's length ({steps:,} of {train.steps:,} steps, samples "
        "and NLL images by the same share): compare the rows with each other, not with the paper's values"
    )

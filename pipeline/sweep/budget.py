"""`ddpm reproduce`: the paper's tables as one study, scaled down to what one has.

A budget shortens every row alike: training steps, samples and NLL images by the same share, so the rows stay
comparable with each other, and by nothing but their order with the paper.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Experiment
from pipeline.errors import ConfigError
from pipeline.store.files import read_json, write_json
from pipeline.store.run import Place

STUDIES = {"cifar10": "table2"}  # what can be reproduced: the sweep file of its rows
TEST_IMAGES = 10_000
FORWARD_AND_BACKWARD = 3  # a training image costs about three forward passes
SHORT = 20_000  # steps below which a constant EMA would still hold its first weights
LEAST_SAMPLES, LEAST_BOUNDS = 64, 16
WARM_UP = 20  # at most so large a part of a run is warm-up; the authors' is 1/160
PROBE_STEPS = 20
BUDGET = "budget.json"


@dataclass(frozen=True)
class Budget:
    """What `--budget` asks for: steps of each row, or hours for all rows together; neither is the paper's length."""

    steps: int | None = None
    hours: float | None = None

    @staticmethod
    def parse(text: str) -> Budget:
        """'2000', '2h', '30min' or 'full'. Raises ConfigError."""
        if text == "full":
            return Budget()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(h|min)?", text)
        if not match or float(match[1]) <= 0 or (match[2] is None and "." in match[1]):
            raise ConfigError(f"--budget {text}: say a number of steps (2000), a time (2h, 30min), or full")
        if match[2] is None:
            return Budget(steps=int(match[1]))
        return Budget(hours=float(match[1]) / (60 if match[2] == "min" else 1))


def forward_passes(experiment: Experiment) -> float:
    """What a run at full length costs, in forward passes of one image: training, samples, bound."""
    timesteps = experiment.diffusion.timesteps
    trained = FORWARD_AND_BACKWARD * experiment.train.steps * experiment.train.batch_size
    drawn = experiment.sample.num_images * (experiment.sample.steps or timesteps)
    return trained + drawn + (experiment.evaluate.nll_images or TEST_IMAGES) * timesteps


def steps_for(hours: float, images_per_second: float, rows: list[Experiment]) -> int:
    """How many steps each row can have, at the rate at which the whole cluster trains, when the rows share the time.

    Everything else is projected from that rate: a forward pass is a third of a training image.
    """
    passes = sum(map(forward_passes, rows))
    share = hours * 3600 * FORWARD_AND_BACKWARD * images_per_second / passes
    return max(1, int(min(1.0, share) * rows[0].train.steps))


def probe(experiment: Experiment) -> Experiment:
    """A few steps of a row, as a run of its own, to measure the rate."""
    train = replace(
        experiment.train, steps=PROBE_STEPS, warmup_steps=1, log_every=PROBE_STEPS // 4, sample_every=0
    )
    return replace(experiment, name="probe", train=train)


def measured_rate(run: Place) -> float:
    """Images per second of a probe: the best window, since the first ones warm up."""
    points = [json.loads(line) for line in run.log.read_text().splitlines()]
    return max(point["metrics"]["train/images_per_second"] for point in points)


def remembered(folder: Path, measure: Callable[[], int]) -> int:
    """The steps that an earlier command settled on, so that the same command again is the same study."""
    if not is_remembered(folder):
        write_json(folder / BUDGET, {"steps": measure()})
    return int(read_json(folder / BUDGET)["steps"])


def is_remembered(folder: Path) -> bool:
    return (folder / BUDGET).exists()


def overrides(steps: int, full: Experiment) -> list[str]:
    """What makes a row of the paper's length one of `steps`; every key that is scaled, and no other."""
    share = steps / full.train.steps
    if share >= 1:
        return []
    images = full.evaluate.nll_images or TEST_IMAGES
    scaled: dict[str, Any] = {
        "train.steps": steps,
        "train.warmup_steps": min(full.train.warmup_steps, max(1, steps // WARM_UP)),
        "train.checkpoint_every": min(full.train.checkpoint_every, max(1, steps // 4)),
        "train.sample_every": min(full.train.sample_every, max(1, steps // 4)),
        "train.log_every": min(full.train.log_every, max(1, steps // 20)),
        "train.ema_warmup": full.train.ema_warmup or steps < SHORT,
        "sample.num_images": max(LEAST_SAMPLES, round(share * full.sample.num_images)),
        "evaluate.nll_images": max(LEAST_BOUNDS, round(share * images)),
    }
    scaled["sample.batch_size"] = min(full.sample.batch_size, scaled["sample.num_images"])
    scaled["evaluate.nll_batch_size"] = min(full.evaluate.nll_batch_size, scaled["evaluate.nll_images"])
    return [f"{key}={json.dumps(value)}" for key, value in scaled.items()]


def said(steps: int, full: Experiment) -> str:
    """What a page says of a study that is shorter than the paper's."""
    share = steps / full.train.steps
    if share >= 1:
        return "at the paper's length"
    return (
        f"scaled down to {100 * share:.2g} % of the paper's length ({steps:,} of {full.train.steps:,} steps, samples "
        "and NLL images by the same share): the rows can be held against each other, not against the paper's values"
    )

"""The memory of a step, as `ddpm doctor EXPERIMENT` prints it; tests/device compares it with fake CUDA tensors."""

import re

import pytest

from pipeline.config import load_experiment
from pipeline.engine.memory import describe_step_memory, estimate_step_memory


def test_the_need_at_any_accumulate_follows_from_two_steps():
    experiment = load_experiment("digits", ["train.batch_size=20000", "train.accumulate=4"])
    text = describe_step_memory(experiment, workers=2)
    estimate = estimate_step_memory(experiment, 10_000, 4) / 2**30
    assert float(text.split()[0]) == pytest.approx(estimate, rel=0.03, abs=0.06)
    least = [int(parts) for parts in re.findall(r"GiB: (\d+)", text)]
    assert len(least) == 3 and least == sorted(least)

"""The memory of a step, as `ddpm doctor EXPERIMENT` prints it; tests/device compares it with fake CUDA tensors."""

import re

import pytest

from pipeline.config import load_experiment
from pipeline.engine.memory import describe_step_memory, estimate_step_memory

SMALL = ["model.channels=32", "model.norm_groups=8", "train.batch_size=2048"]


def test_the_need_at_any_accumulate_follows_from_two_steps():
    for parts in (1, 8):
        experiment = load_experiment("cifar10", [*SMALL, f"train.accumulate={parts}"])
        said = describe_step_memory(experiment, workers=2)
        need = float(said.split()[0])
        assert need == pytest.approx(
            estimate_step_memory(experiment, 1024, parts) / 2**30, rel=0.03, abs=0.06
        )
    least = [int(parts) for parts in re.findall(r"GiB: (\d+)", said)]
    assert len(least) == 3 and least == sorted(least)

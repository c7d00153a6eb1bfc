"""What `make soak` does many times over, once each: a process of a run with two Ray workers is killed with -9."""

import random
from pathlib import Path

import pytest
from conftest import TINY
from soak import Run, differences

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 600
EXPERIMENT = [
    *TINY, "train.checkpoint_every=25", "train.log_every=5", "train.keep=2", "model.dropout=0.1",
    "diffusion.timesteps=100", "sample.num_images=300", "evaluate.nll_images=60", "evaluate.nll_batch_size=2",
    "figures.which=[samples]",
]  # fmt: skip


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("untouched"), EXPERIMENT, STEPS)
    run.finish()
    return run


@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        ("training", "worker"),
        ("training", "controller"),
        ("training", "driver"),
        ("checkpoint", "worker"),
        ("sampling", "task"),
        ("evaluation", "task"),
    ],
)
def test_a_run_with_a_process_killed_is_the_untouched_one(tmp_path: Path, untouched: Run, phase, victim):
    run = Run(tmp_path, EXPERIMENT, STEPS)
    where = run.kill(phase, victim, random.Random(0))
    assert where is not None, "there was nothing to kill in time"
    run.finish()
    assert differences(run, untouched) == []

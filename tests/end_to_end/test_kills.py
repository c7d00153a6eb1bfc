"""What `make soak` does many times over, once each: a process of a run with two Ray workers is killed with -9."""

import random
from collections.abc import Iterator

import pytest
from conftest import TINY
from soak import Run, differences

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 300
EXPERIMENT = [
    *TINY, "train.checkpoint_every=25", "train.log_every=5", "train.keep=2", "model.dropout=0.1",
    "diffusion.timesteps=100", "evaluate.nll_timesteps=null",
    "sample.num_images=300", "evaluate.nll_images=60", "evaluate.nll_batch_size=2",
    "figures.which=[samples]",
]  # fmt: skip


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("untouched"), EXPERIMENT, STEPS)
    run.finish()
    return run


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    run = Run(tmp_path, EXPERIMENT, STEPS)
    yield run
    run.command.kill()


@pytest.mark.parametrize(("phase", "victim"), [
    ("training", "worker"), ("training", "controller"), ("training", "driver"), ("training", "group"),
    ("checkpoint", "worker"), ("checkpoint", "hangup"), ("sampling", "task"), ("sampling", "group"),
    ("evaluation", "task"),
])  # fmt: skip
def test_a_run_with_a_process_killed_is_the_untouched_one(run: Run, untouched: Run, phase, victim):
    where = run.kill(phase, victim, random.Random(0))
    assert where is not None, "there was nothing to kill in time"
    run.finish()
    assert differences(run, untouched) == []
    if victim == "controller":
        told = (run.storage / "output.log").read_text()
        assert "error: training lost the process that leads it; the same command continues" in told

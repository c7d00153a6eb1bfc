"""The memory of a step, as `ddpm doctor EXPERIMENT` prints it; tests/device compares it with fake CUDA tensors."""

import re

import pytest

from pipeline.compute.memory import choose_accumulate, describe_step_memory, estimate_step_memory
from pipeline.config import load_experiment
from pipeline.errors import PipelineError


def load_digits(*overrides):
    return load_experiment("digits", ["model.channels=32", "model.num_res_blocks=1", *overrides])


def test_the_need_at_any_accumulate_follows_from_two_steps():
    experiment = load_digits("train.batch_size=20000", "train.accumulate=4")
    text = describe_step_memory(experiment, workers=2)
    estimate = estimate_step_memory(experiment, 10_000, 4) / 2**30
    assert float(text.split()[0]) == pytest.approx(estimate, rel=0.03, abs=0.06)
    least = [int(parts) for parts in re.findall(r"GiB: (\d+)", text)]
    assert len(least) == 3 and least == sorted(least)


def test_levels_that_compute_their_activations_again_hold_less():
    kept, again = (estimate_step_memory(load_digits(f"model.recompute={n}"), 2000, 1) for n in (0, 1))
    assert again < 0.9 * kept


def test_the_least_accumulate_is_the_first_whose_peak_fits_into_nine_tenths_of_a_card():
    experiment = load_digits()
    peaks = {parts: estimate_step_memory(experiment, 2000, parts) / 2**30 for parts in (1, 3, 4)}
    assert choose_accumulate(experiment, 2000, card=peaks[1] / 0.89) == 1
    assert choose_accumulate(experiment, 2000, card=(peaks[3] + peaks[4]) / 2 / 0.9) == 4
    with pytest.raises(PipelineError, match=r"this one has 0\.0 GiB: use train\.precision"):
        choose_accumulate(experiment, 2000, card=0.001)

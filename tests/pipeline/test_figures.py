"""Figures: the right pictures in the right order, drawn once."""

import numpy as np
import pytest
import torch
from conftest import one_cpu
from PIL import Image
from staged import run_stage, with_weights

from ddpm.images import to_uint8
from pipeline import figures, sample, tars


@pytest.fixture
def drawn(tiny_run):
    experiment, run = tiny_run
    with_weights(experiment, run)
    run_stage(sample, experiment, run)
    assert sorted(run_stage(figures, experiment, run)) == ["figure progressive", "figure samples"]
    assert figures.is_done(experiment, run)
    return experiment, run


def test_progressive_ends_in_the_samples(drawn):
    experiment, run = drawn
    stages = figures.progressive(one_cpu().context, experiment, run, 6)
    assert stages.shape == (10, 6, 1, 8, 8)
    last = to_uint8(stages[-1]).numpy().astype(int)
    samples = tars.load_images(sample.directory(experiment, run), "samples", 0, 6)[0]
    assert (np.abs(last - samples) <= 1).mean() > 0.999
    assert not torch.equal(stages[0], stages[-1])


@pytest.mark.parametrize("steps", [1, 3, 10, 20, 1000])
def test_stages_are_evenly_spaced_and_end_the_chain(steps):
    kept = sorted(figures.shown_steps(steps))
    assert kept[-1] == steps and len(kept) == min(10, steps)
    assert steps < 10 or set(np.diff([0, *kept])) == {steps // 10}


def test_pictures_show_the_images(drawn):
    experiment, run = drawn
    folder = figures.directory(experiment, run)
    with Image.open(folder / "samples.png") as picture:
        cells = np.asarray(picture)[1:-1:8, 1:-1:8, 0]
        assert picture.size == (3 * 66, 4 * 66)
    samples = tars.load_images(sample.directory(experiment, run), "samples")[0]
    assert np.array_equal(cells[:8, :8], samples[0, 0])
    with Image.open(folder / "progressive.png") as picture:
        assert picture.size == (10 * 66, 10 * 66)
        last_column = np.asarray(picture)[1:, 9 * 66 + 1 :: 8, 0][:, :8]
    rows = np.stack([last_column[66 * row : 66 * row + 64 : 8] for row in range(10)])
    assert (np.abs(rows.astype(int) - samples[:10, 0]) <= 1).mean() > 0.999, (
        "a row is one image, its end a sample"
    )


def test_a_missing_picture_is_drawn_again(drawn):
    experiment, run = drawn
    (figures.directory(experiment, run) / "samples.png").unlink()
    assert not figures.is_done(experiment, run)
    assert "figure samples" in run_stage(figures, experiment, run)
    assert figures.is_done(experiment, run)

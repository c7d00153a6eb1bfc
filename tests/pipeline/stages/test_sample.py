"""Sampling: images are functions of (seed, index), units are complete or absent."""

import numpy as np
import pytest
from conftest import one_cpu
from PIL import Image
from staged import asking_for, run_stage, with_weights

from pipeline.errors import PipelineError
from pipeline.stages import sample
from pipeline.store import tars


def images_of(run):
    return tars.load_images(run.samples, "samples")[0]


def test_other_batches_give_the_same_images_and_bf16_another_set(sampled):
    other = asking_for(sampled, batch_size=4)
    assert len(run_stage(sample, other)) == 3
    assert other.samples != sampled.samples
    difference = np.abs(images_of(sampled).astype(int) - images_of(other))
    assert (difference <= 1).mean() > 0.999
    fast = asking_for(sampled, precision="bf16")
    run_stage(sample, fast)
    said = [sample.make_sample_protocol(run.experiment)["precision"] for run in (fast, sampled)]
    assert said == ["bf16", "fp32"]
    difference = np.abs(images_of(sampled).astype(int) - images_of(fast))
    assert 0 < difference.mean() < 20, "not the same bits, and much the same images"


def test_units_are_whole_drawn_once_and_joined_by_those_of_more_images(tiny_run):
    """Four images, then twelve, killed after the first unit and gone on with, then fifteen."""
    with_weights(tiny_run)
    assert run_stage(sample, asking_for(tiny_run, num_images=4)) == ["samples 0-3"], "no more than asked"
    units, folder = next(sample.STAGE.work(tiny_run)), tiny_run.samples
    assert [unit.name for unit in units] == ["samples 0-5", "samples 6-11"], "0-3 is no whole unit"
    one_cpu().run_units(units[:1], lambda unit: None)
    assert not sample.STAGE.is_done(tiny_run)
    assert run_stage(sample, tiny_run) == ["samples 6-11"] and sample.STAGE.is_done(tiny_run)
    with Image.open(folder / "grid.png") as grid:
        assert grid.size == (10 * (64 + 2), 2 * (64 + 2))
    text = (folder / "sample.yaml").read_text()
    for line in ("checkpoint: 6", "weights: ema", "sampler: ancestral", "steps: 20", "variance: fixedsmall"):
        assert line in text
    assert next(record.key for record in tars.read_records(folder / "00001.tar")) == "00000006"
    before = {name: (folder / name).read_bytes() for name in ("00000.tar", "00001.tar")}
    more = asking_for(tiny_run, num_images=15)
    assert more.samples == folder
    assert run_stage(sample, more) == ["samples 12-17"]
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert tars.open_shards(folder).count_images("samples") == 18  # the last unit is whole too
    assert sample.STAGE.is_done(tiny_run), "a set with more than was asked for will do"


def test_weights_that_diverged_are_refused(tiny_run):
    with_weights(tiny_run, scale=float("nan"))
    with pytest.raises(PipelineError, match=r"samples 0-5 .* not finite.*step 6"):
        run_stage(sample, tiny_run)
    assert not list(tiny_run.samples.glob("*.tar"))

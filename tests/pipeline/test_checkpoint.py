"""Checkpoints are whole and verified, or passed over for the one before."""

import logging

import pytest
import torch

from pipeline import checkpoint
from pipeline.errors import PipelineError

TENSORS = {"net.w": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7)}
EMA = {"w": torch.ones(2, 3)}


def saved(run, *steps):
    for step in steps:
        checkpoint.save(run.step_dir(step), TENSORS, EMA, step)


def test_tensors_come_back_as_they_were(tiny_run):
    _, run = tiny_run
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    checkpoint.save(run.step_dir(1), {**TENSORS, "c": channels_last, "same": TENSORS["net.w"]}, EMA, 1)
    loaded = checkpoint.load(run.step_dir(1))
    assert torch.equal(loaded["c"], channels_last)
    assert torch.equal(loaded["same"], TENSORS["net.w"])
    assert loaded["step"] == 7
    assert torch.equal(checkpoint.weights(run.step_dir(1), "raw")["w"], TENSORS["net.w"])
    assert torch.equal(checkpoint.weights(run.step_dir(1), "ema")["w"], EMA["w"])


def truncate(directory):
    path = directory / checkpoint.STATE
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(directory):
    path = directory / checkpoint.STATE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def lose_meta(directory):
    (directory / checkpoint.META).unlink()


def lose_ema(directory):
    (directory / checkpoint.EMA).unlink()


def empty_meta(directory):
    (directory / checkpoint.META).write_text("{}")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_meta, lose_ema, empty_meta])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tiny_run, caplog, damage):
    _, run = tiny_run
    saved(run, 2, 4)
    damage(run.step_dir(4))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(run, at_most=10) == 2
    assert "step_00000004" in caplog.text
    with pytest.raises(PipelineError, match="step_00000004"):
        checkpoint.load(run.step_dir(4))


def test_the_newest_is_not_beyond_what_is_asked(tiny_run):
    _, run = tiny_run
    saved(run, 2, 4, 6)
    assert checkpoint.newest(run, at_most=5) == 4
    assert checkpoint.newest(run, at_most=1) is None


def test_a_folder_under_its_temporary_name_is_not_a_checkpoint(tiny_run):
    _, run = tiny_run
    saved(run, 2)
    run.step_dir(2).rename(run.train / ".tmp-step_00000002-abc")
    assert checkpoint.newest(run, at_most=5) is None


def test_only_the_newest_are_kept(tiny_run):
    _, run = tiny_run
    saved(run, 1, 2, 3, 4, 8)
    checkpoint.keep_newest(run, 2, at_most=4)  # a run of fewer steps leaves what a longer one made
    assert checkpoint.steps_on_disk(run.train) == [3, 4, 8]


def test_a_missing_step_names_those_that_exist(tiny_run):
    experiment, run = tiny_run
    saved(run, 2)
    with pytest.raises(PipelineError, match=r"no checkpoint of step 5 \(there are: 2\)"):
        checkpoint.load_network(experiment, run, 5, "ema", "cpu")


def test_weights_of_another_network_are_refused(tiny_run):
    experiment, run = tiny_run
    saved(run, 2)
    with pytest.raises(PipelineError, match="another network"):
        checkpoint.load_network(experiment, run, 2, "ema", "cpu")

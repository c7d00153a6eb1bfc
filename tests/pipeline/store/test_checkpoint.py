"""Checkpoints are whole and verified, or skipped for the one before."""

import logging

import pytest
import torch
from staged import asking_for, change, scoring

from pipeline.errors import PipelineError
from pipeline.store import checkpoint
from pipeline.store.files import write_json, write_text
from pipeline.store.run import list_steps

TENSORS = {"net.w": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7)}
EMA = {"w": torch.ones(2, 3)}


def saved(run, *steps):
    ema = checkpoint.create_network(run.experiment).state_dict()
    state = {f"net.{name}": tensor for name, tensor in ema.items()}
    for step in steps:
        checkpoint.save_checkpoint(run.locate_step(step), state, ema, step, run_key=run.run_key)


def test_tensors_come_back_as_they_were(tiny_run):
    run = tiny_run
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {**TENSORS, "c": channels_last, "same": TENSORS["net.w"], "ema.1.w": torch.full((2,), 3.0)}
    checkpoint.save_checkpoint(run.locate_step(1), checkpoint.copy_to_cpu(tensors, {}), EMA, 1)
    loaded = checkpoint.load_checkpoint(run.locate_step(1))
    assert torch.equal(loaded["c"], channels_last)
    assert torch.equal(loaded["same"], TENSORS["net.w"])
    assert loaded["step"] == 7
    assert torch.equal(checkpoint.load_weights(run.locate_step(1), "raw")["w"], TENSORS["net.w"])
    assert torch.equal(checkpoint.load_weights(run.locate_step(1), "ema")["w"], EMA["w"])
    assert torch.equal(checkpoint.load_weights(run.locate_step(1), "ema", 1)["w"], tensors["ema.1.w"])


DAMAGES = {
    "truncated": (checkpoint.STATE, lambda content: content[:-3]),
    "flipped-bit": (checkpoint.STATE, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "no-meta": (checkpoint.META, None),
    "no-ema": (checkpoint.EMA, None),
    "empty-meta": (checkpoint.META, lambda content: b"{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tiny_run, caplog, damage):
    run = tiny_run
    saved(run, 2, 4)
    name, change = DAMAGES[damage]
    file = run.locate_step(4) / name
    file.write_bytes(change(file.read_bytes())) if change else file.unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find_newest_step(run, at_most=10) == 2
    assert "step_00000004" in caplog.text
    with pytest.raises(PipelineError, match="step_00000004"):
        checkpoint.load_checkpoint(run.locate_step(4))


def test_the_newest_is_not_beyond_what_is_asked_nor_under_a_temporary_name(tiny_run):
    run = tiny_run
    saved(run, 2, 4, 6)
    assert checkpoint.find_newest_step(run, at_most=5) == 4
    assert checkpoint.find_newest_step(run, at_most=1) is None
    run.locate_step(4).rename(run.train / ".tmp-step_00000004-abc")
    assert checkpoint.find_newest_step(run, at_most=5) == 2


def keeping(run, keep, keep_every=None, checkpoints=None, every=1, steps=()):
    rules = {"keep": keep, "keep_every": keep_every, "checkpoint_every": every, "keep_steps": steps}
    return scoring(change(run, "train", **rules), checkpoints=checkpoints)


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({"keep": 2}, [5, 6, 8]),
        ({"keep": 2, "keep_every": 2}, [2, 4, 5, 6, 8]),
        ({"keep": 1, "checkpoints": "every:3"}, [3, 6, 8]),
        ({"keep": 1, "checkpoints": "all"}, [6, 8]),
        ({"keep": 2, "every": 2}, [4, 6, 8]),  # 1, 3 and 5 are of interruptions
        ({"keep": 2, "every": 4}, [4, 6, 8]),  # as 6 is, but it is the newest
    ],
)
def test_old_checkpoints_go_and_others_stay(tiny_run, rules, left):
    saved(tiny_run, 1, 2, 3, 4, 5, 6, 8)
    # a longer tiny_run's are none of its business
    checkpoint.delete_old_checkpoints(keeping(tiny_run, **rules), at_most=6)
    assert list_steps(tiny_run.train) == left


def test_what_anything_refers_to_stays_and_all_where_it_is_not_known(tiny_run, caplog):
    saved(tiny_run, 1, 2, 3, 4, 5, 6)
    at = {step: {"protocol": {"checkpoint": step}} for step in (1, 2, 3, 4)}
    write_json(tiny_run.path / "samples" / "unfinished" / "00000.json", at[1])
    write_json(tiny_run.path / "samples" / "whole" / "manifest.json", at[2])
    write_json(tiny_run.path / "evaluation" / "0a" / "metrics.json", at[3])
    write_json(tiny_run.path / "selection" / "0b" / "selection.json", {"scores": [{"step": 4}], "best": 4})
    checkpoint.delete_old_checkpoints(keeping(tiny_run, 1), at_most=6)
    assert list_steps(tiny_run.train) == [1, 2, 3, 4, 6]
    saved(tiny_run, 5)
    write_text(tiny_run.path / "evaluation" / "0a" / "metrics.json", "{")
    checkpoint.delete_old_checkpoints(keeping(tiny_run, 1), at_most=6)
    assert list_steps(tiny_run.train) == [1, 2, 3, 4, 5, 6]
    assert "no checkpoint is deleted" in caplog.text


def test_a_kept_step_can_be_scored_but_not_resumed(tiny_run, caplog):
    saved(tiny_run, 1, 2, 4, 6)
    checkpoint.delete_old_checkpoints(keeping(tiny_run, 1, every=3, steps=(2, 4, 6)), at_most=6)
    assert list_steps(tiny_run.train) == [2, 4, 6]
    resumable = [checkpoint.verify_checkpoint(tiny_run.locate_step(step)) for step in (2, 4, 6)]
    assert resumable == [False, False, True]
    assert checkpoint.is_valid(tiny_run, 4) and checkpoint.load_weights(tiny_run.locate_step(4), "ema")
    assert checkpoint.find_newest_step(tiny_run, at_most=5) is None and not caplog.text
    with pytest.raises(PipelineError, match="nothing resumes"):
        checkpoint.load_checkpoint(tiny_run.locate_step(4))
    raw = asking_for(tiny_run, weights="raw")
    assert checkpoint.is_valid(raw, 6) and not checkpoint.is_valid(raw, 4)


def test_a_missing_step_and_the_weights_of_another_network_are_refused(tiny_run):
    saved(tiny_run, 2)
    checkpoint.save_checkpoint(tiny_run.locate_step(2), TENSORS, EMA, 2)
    for step, complaint in ((5, r"no checkpoint of step 5 \(there are: 2\)"), (2, "another network")):
        with pytest.raises(PipelineError, match=complaint):
            checkpoint.load_model(asking_for(tiny_run, checkpoint=step), torch.device("cpu"))

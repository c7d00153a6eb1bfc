"""Checkpoints are whole and verified, or skipped for the one before."""

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import flip_bit
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
    folder, image = tiny_run.locate_step(1), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {**TENSORS, "c": image, "same": TENSORS["net.w"], "ema.1.w": torch.full((2,), 3.0)}
    checkpoint.save_checkpoint(folder, checkpoint.copy_to_cpu(tensors, {}), EMA, 1)
    loaded = checkpoint.load_checkpoint(folder)
    assert all(torch.equal(loaded[name], tensors[name]) for name in ("c", "same", "step"))
    for which, wanted in (("raw",), TENSORS["net.w"]), (("ema",), EMA["w"]), (("ema", 1), tensors["ema.1.w"]):
        assert torch.equal(checkpoint.load_weights(folder, *which)["w"], wanted)


@pytest.mark.parametrize(("name", "change"), [
    (checkpoint.STATE, lambda file: file.write_bytes(file.read_bytes()[:-3])), (checkpoint.STATE, flip_bit),
    (checkpoint.META, Path.unlink), (checkpoint.EMA, Path.unlink),
    (checkpoint.META, lambda file: file.write_text("{}")),
])  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tiny_run, caplog, name, change):
    saved(tiny_run, 2, 4, 6)
    tiny_run.locate_step(6).rename(tiny_run.train / ".tmp-step_00000006-abc")  # is none
    newest = partial(checkpoint.find_newest_step, tiny_run)
    assert list_steps(tiny_run.train) == [2, 4]
    assert [newest(at_most=step) for step in (1, 3, 9)] == [None, 2, 4]
    change(tiny_run.locate_step(4) / name)
    with caplog.at_level(logging.WARNING):
        assert newest(at_most=10) == 2
    assert "step_00000004" in caplog.text
    with pytest.raises(PipelineError, match="step_00000004"):
        checkpoint.load_checkpoint(tiny_run.locate_step(4))


def keeping(run, keep, keep_every=None, checkpoints=None, every=1, steps=()):
    rules = {"keep": keep, "keep_every": keep_every, "checkpoint_every": every, "keep_steps": steps}
    return scoring(change(run, "train", **rules), checkpoints=checkpoints)


@pytest.mark.parametrize(("rules", "left"), [
    ({"keep": 2}, [5, 6, 8]), ({"keep": 2, "keep_every": 2}, [2, 4, 5, 6, 8]),
    ({"keep": 1, "checkpoints": "every:3"}, [3, 6, 8]), ({"keep": 1, "checkpoints": "all"}, [6, 8]),
    ({"keep": 2, "every": 2}, [4, 6, 8]),  # 1, 3 and 5 are of interruptions
    ({"keep": 2, "every": 4}, [4, 6, 8]),  # as 6 is, but it is the newest
])  # fmt: skip
def test_old_checkpoints_go_and_others_stay(tiny_run, rules, left):
    saved(tiny_run, 1, 2, 3, 4, 5, 6, 8)
    # a longer tiny_run's are none of its business
    checkpoint.delete_old_checkpoints(keeping(tiny_run, **rules), at_most=6)
    assert list_steps(tiny_run.train) == left


def test_what_anything_refers_to_stays_and_all_where_it_is_not_known(tiny_run, caplog):
    saved(tiny_run, 1, 2, 3, 4, 5, 6)
    names = ("samples/unfinished/00000.json", "samples/whole/manifest.json", "evaluation/0a/metrics.json")
    for step, name in enumerate(names, 1):
        write_json(tiny_run.path / name, {"protocol": {"checkpoint": step}})
    write_json(tiny_run.path / "selection" / "0b" / "selection.json", {"scores": [{"step": 4}], "best": 4})
    checkpoint.delete_old_checkpoints(keeping(tiny_run, 1), at_most=6)
    assert list_steps(tiny_run.train) == [1, 2, 3, 4, 6]
    saved(tiny_run, 5)
    write_text(tiny_run.path / names[-1], "{")
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
    checkpoint.save_checkpoint(tiny_run.locate_step(2), TENSORS, EMA, 2)
    for step, complaint in ((5, r"no checkpoint of step 5 \(there are: 2\)"), (2, "another network")):
        with pytest.raises(PipelineError, match=complaint):
            checkpoint.load_model(asking_for(tiny_run, checkpoint=step), torch.device("cpu"))

"""The training loop: stateless order, exact resumption, one point per step, whatever happens."""

import dataclasses
import errno
import json
import threading

import pytest
import torch
from conftest import one_cpu, renamed
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import ContextUNet
from pipeline import config
from pipeline.compute.units import Worker
from pipeline.engine.find import make_place
from pipeline.errors import PipelineError
from pipeline.stages import train
from pipeline.store import checkpoint


def train_to(experiment, run, steps):
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=steps))
    train.STAGE.run_worker(one_cpu().context, run.of(experiment))


def final_state(run, step):
    return checkpoint.load_checkpoint(run.step_folder(step))


def points(run):
    return [json.loads(line) for line in run.log.read_text().splitlines()]


# The order


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 40), batch_size=st.integers(1, 50), workers=st.integers(1, 5),
    start=st.integers(0, 7), seed=st.integers(0, 2**40),
)  # fmt: skip
def test_every_image_once_per_epoch_for_any_workers_batch_and_start(
    num_images, batch_size, workers, start, seed
):
    workers = min(workers, batch_size)
    steps = start + 3 * num_images // batch_size + 2
    seen = []
    for step in range(start, steps):
        fresh = train.ImageOrder(seed, num_images)  # a new process at every step: nothing is carried over
        for rank in range(workers):
            rows = train.slice_batch(batch_size, rank, workers)
            seen += fresh.list_indices(step, batch_size, rows).tolist()
    everything = train.ImageOrder(seed, num_images).list_indices(
        0, steps * batch_size, torch.arange(steps * batch_size)
    )
    assert seen == everything[start * batch_size :].tolist()
    for epoch in everything.split(num_images)[: len(everything) // num_images]:
        assert sorted(epoch.tolist()) == list(range(num_images))


def test_epochs_and_seeds_have_different_orders():
    order = train.ImageOrder(0, 100).list_indices(0, 200, torch.arange(200))
    assert not torch.equal(order[:100], order[100:])
    assert not torch.equal(order[:100], train.ImageOrder(1, 100).list_indices(0, 100, torch.arange(100)))


@given(batch_size=st.integers(1, 300), workers=st.integers(1, 9))
def test_slices_cover_the_batch_in_order(batch_size, workers):
    slices = [train.slice_batch(batch_size, rank, workers) for rank in range(workers)]
    assert torch.equal(torch.cat(slices), torch.arange(batch_size))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


# The loop


def test_images_read_from_the_tars_train_the_same_run(tiny_run):
    experiment, run = tiny_run
    from_memory = renamed(run, "-from-memory")
    train_to(experiment, from_memory, 3)
    context = Worker(torch.device("cpu"), cpus=1, image_memory=0)
    shorter = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=3))
    train.STAGE.run_worker(context, run.of(shorter))
    ours, theirs = final_state(run, 3), final_state(from_memory, 3)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_equals_an_untouched_one_bit_for_bit(tiny_run):
    experiment, run = tiny_run
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, dropout=0.3))
    untouched = renamed(run, "-untouched")
    train_to(experiment, untouched, 6)
    train_to(experiment, run, 4)
    torch.randn(5)  # whatever else the process drew
    train_to(experiment, run, 6)
    ours, theirs = final_state(run, 6), final_state(untouched, 6)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[point["metrics"]["train/loss"] for point in points(r)] for r in (run, untouched)]
    assert losses[0] == losses[1]


def test_a_final_checkpoint_that_fails_its_hash_is_made_again(tiny_run):
    experiment, run = tiny_run
    train_to(experiment, run, 6)
    good = {name: tensor.clone() for name, tensor in final_state(run, 6).items()}  # not a map of the file
    file = run.step_folder(6) / checkpoint.STATE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert not train.STAGE.is_done(run.of(experiment))
    train_to(experiment, run, 6)
    assert train.STAGE.is_done(run.of(experiment))
    assert all(torch.equal(final_state(run, 6)[name], good[name]) for name in good)


def test_fewer_steps_than_were_trained_leave_the_others_alone(tiny_run):
    experiment, run = tiny_run
    train_to(experiment, run, 6)
    train_to(experiment, run, 1)
    assert checkpoint.list_steps(run.train) == [1, 2, 4, 6]


def test_steps_computed_again_are_logged_once(tiny_run):
    experiment, run = tiny_run
    train_to(experiment, run, 6)
    before = points(run)
    for step in (4, 6):
        (run.step_folder(step) / checkpoint.META).unlink()
    with run.log.open("a") as file:
        file.write('{"step": 7, "ti')  # a writer killed in mid-line
    train_to(experiment, run, 6)
    assert points(run) == before
    assert [point["step"] for point in before] == [1, 2, 3, 4, 5, 6]


def test_the_first_update_has_rate_zero_and_the_curve_is_complete(tiny_run):
    experiment, run = tiny_run
    train_to(experiment, run, 6)
    metrics = points(run)[0]["metrics"]
    assert metrics["train/lr"] == 0
    assert metrics.keys() == {"train/loss", "train/grad_norm", "train/lr", "train/images_per_second"}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tiny_run):
    experiment, run = tiny_run
    train_to(experiment, run, 2)
    wild = dataclasses.replace(experiment.train, lr=1e30, grad_clip=None, log_every=100, checkpoint_every=5)
    with pytest.raises(PipelineError, match=r"loss became .* lower train\.lr"):
        train_to(dataclasses.replace(experiment, train=wild), run, 40)
    assert checkpoint.find_newest(run, at_most=100) == 2


def test_the_stop_file_ends_training_with_a_checkpoint(tiny_run):
    experiment, run = tiny_run
    run.stop_file.touch()
    train_to(experiment, run, 6)
    assert checkpoint.find_newest(run, at_most=6) == 1


def stop_at(run, step):
    """A context under which training is asked to stop after `step`."""
    context = one_cpu().context
    asked = iter(range(1, step + 1))
    context.decide = lambda flag: next(asked) == step
    return context


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_run_stopped_between_two_points_has_an_untouched_runs_curve(tiny_run, step):
    experiment, run = tiny_run
    seldom = dataclasses.replace(experiment.train, log_every=4, checkpoint_every=8, steps=12)
    experiment = dataclasses.replace(experiment, train=seldom)
    untouched = renamed(run, "-untouched")
    train.STAGE.run_worker(one_cpu().context, untouched.of(experiment))
    train.STAGE.run_worker(stop_at(run, step), run.of(experiment))
    assert checkpoint.list_steps(run.train) == [step]
    train.STAGE.run_worker(one_cpu().context, run.of(experiment))
    ours, theirs = (
        [(p["step"], p["metrics"]["train/loss"], p["metrics"]["train/grad_norm"]) for p in points(r)]
        for r in (run, untouched)
    )
    assert ours == theirs and [step for step, *_ in ours] == [4, 8, 12]
    assert final_state(run, 12).keys() == final_state(untouched, 12).keys()


def test_a_run_that_has_diverged_is_not_saved_when_it_is_stopped(tiny_run):
    experiment, run = tiny_run
    wild = dataclasses.replace(
        experiment.train, lr=1e30, warmup_steps=0, grad_clip=None, log_every=100, steps=40
    )
    with pytest.raises(PipelineError, match="loss became"):
        train.STAGE.run_worker(
            stop_at(run, 30),
            run.of(dataclasses.replace(experiment, train=dataclasses.replace(wild, checkpoint_every=50))),
        )
    assert checkpoint.list_steps(run.train) == []


def test_training_goes_on_while_a_checkpoint_is_written(tiny_run, monkeypatch):
    """The file holds the state of its step although the tensors have moved on meanwhile."""
    experiment, run = tiny_run
    untouched = renamed(run, "-untouched")
    train_to(experiment, untouched, 6)
    stepped, write = threading.Event(), checkpoint.save_checkpoint

    def slow(directory, *args):
        if directory == run.step_folder(2):
            assert stepped.wait(20), "training waited for the checkpoint"
        write(directory, *args)

    class Beat(train.Heartbeat):
        def beat(self, step):
            if step == 3:
                stepped.set()

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(train, "Heartbeat", Beat)
    train_to(experiment, run, 6)
    for step in (2, 4, 6):
        ours, theirs = final_state(run, step), final_state(untouched, step)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_a_killed_group_left_half_written_is_gone_when_the_next_one_trains(tiny_run):
    """The command that holds the run goes on through many groups, and checkpoints are large."""
    experiment, run = tiny_run
    torn = run.train / ".tmp-step_00000002-abc"
    torn.mkdir(parents=True)
    (torn / checkpoint.STATE).write_bytes(b"half")
    train_to(experiment, run, 2)
    assert [path.name for path in run.train.iterdir()] == ["step_00000002"]


def test_a_checkpoint_that_cannot_be_written_ends_training(tiny_run, monkeypatch):
    experiment, run = tiny_run

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises((PipelineError, OSError), match="No space left"):
        train_to(experiment, run, 6)
    assert checkpoint.list_steps(run.train) == []


def test_more_workers_than_images_in_the_batch_are_refused(tiny_run):
    experiment, run = tiny_run
    context = one_cpu().context
    context.world_size = 17
    with pytest.raises(PipelineError, match="17 workers cannot share"):
        train.STAGE.run_worker(context, run.of(experiment))


def test_grids_show_the_same_noise_at_every_step(tiny_run):
    experiment, run = tiny_run
    often = dataclasses.replace(experiment.train, sample_every=3)
    train_to(dataclasses.replace(experiment, train=often), run, 6)
    assert sorted(path.name for path in run.grids.iterdir()) == ["00000003.png", "00000006.png"]


def test_grids_of_a_network_that_takes_labels_show_each_class(sharded_storage, monkeypatch):
    small = ["diffusion.timesteps=4", "sample.steps=null", "model.channels=8", "model.norm_groups=4"]
    often = ["train.batch_size=16", "train.sample_every=2"]
    experiment = config.load_experiment("context_digits", [*small, *often])
    asked = []
    forward = ContextUNet.forward

    def listening(net, x_t, t, context=None):
        if len(x_t) == train.GRID_SIDE**2:
            asked.append(context.tolist())
        return forward(net, x_t, t, context)

    monkeypatch.setattr(ContextUNet, "forward", listening)
    train_to(experiment, make_place(experiment, sharded_storage), 2)
    assert asked and all(labels[:12] == [*range(10), 0, 1] for labels in asked)


@pytest.mark.slow
def test_a_compiled_network_trains_the_same_run_up_to_rounding(tiny_run):
    experiment, run = tiny_run
    train_to(experiment, run, 3)
    compiled = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, compile=True))
    other = renamed(run, "-compiled")
    train_to(compiled, other, 3)
    for ours, theirs in zip(points(other), points(run), strict=True):
        assert ours["metrics"]["train/loss"] == pytest.approx(theirs["metrics"]["train/loss"], rel=1e-4)
        assert ours["metrics"]["train/grad_norm"] == pytest.approx(
            theirs["metrics"]["train/grad_norm"], rel=1e-3
        )
    state, expected = final_state(other, 3), final_state(run, 3)
    assert state.keys() == expected.keys(), "the checkpoint does not say that it was compiled"

"""The training loop: stateless order, exact resumption, one point per step, whatever happens."""

import json
import threading
from unittest.mock import Mock, create_autospec

import pytest
import torch
from conftest import one_cpu, renamed
from hypothesis import given, settings
from hypothesis import strategies as st
from staged import change

from ddpm import ContextUNet
from pipeline import config
from pipeline.compute.units import Unit, UnitKind, Worker
from pipeline.engine.find import make_place
from pipeline.errors import PipelineError
from pipeline.stages import train
from pipeline.store import checkpoint
from pipeline.store.log import read_progress
from pipeline.store.run import list_steps


def train_to(run, steps, context=None):
    train.STAGE.run_worker(context or one_cpu().context, change(run, "train", steps=steps))
    return [json.loads(line) for line in run.log.read_text().splitlines()] if run.log.exists() else []


def curve(points, *names):
    return [(point["step"], *(point["metrics"][f"train/{name}"] for name in names)) for point in points]


def assert_equal_states(run, other, *steps):
    for step in steps:
        ours, theirs = (checkpoint.load_checkpoint(one.locate_step(step)) for one in (run, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 40), batch_size=st.integers(1, 50), workers=st.integers(1, 5),
    start=st.integers(0, 7), seed=st.integers(0, 2**40),
)  # fmt: skip
def test_every_image_once_per_epoch_for_any_cut(num_images, batch_size, workers, start, seed):
    workers = min(workers, batch_size)
    steps = start + 3 * num_images // batch_size + 2
    seen = []
    for step in range(start, steps):
        slices = [train.slice_batch(batch_size, rank, workers) for rank in range(workers)]
        assert max(map(len, slices)) - min(map(len, slices)) <= 1
        for rows in slices:
            seen += train.list_image_indices(seed, num_images, step, batch_size, rows).tolist()
    slots = torch.arange(steps * batch_size)
    everything = train.list_image_indices(seed, num_images, 0, steps * batch_size, slots)
    assert seen == everything[start * batch_size :].tolist()
    for epoch in everything.split(num_images)[: len(everything) // num_images]:
        assert sorted(epoch.tolist()) == list(range(num_images))
    order, other = (train.list_image_indices(own, 100, 0, 200, torch.arange(200)) for own in (seed, seed + 1))
    assert not torch.equal(order[:100], order[100:]) and not torch.equal(order[:100], other[:100])


@pytest.mark.parametrize("workers, recompute", [(1, 0), (2, 1)])
def test_five_steps_compile_one_graph(tiny_run, monkeypatch, workers, recompute):
    """With two workers, so does the pass before the first step."""
    graphs, compile_network = [], torch.compile

    def note_graph(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda net: compile_network(net, backend=note_graph))
    tiny_run = change(tiny_run, "train", compile=True, accumulate=2, precision="bf16")
    tiny_run = change(tiny_run, "model", dropout=0.3, recompute=recompute, num_res_blocks=1)
    train_to(tiny_run, 5, Worker(torch.device("cpu"), cpus=1, world_size=workers))
    assert len(graphs) == 1


def test_a_graph_is_for_gpus_and_its_absence_is_said(tiny_run, caplog):
    points = train_to(change(renamed(tiny_run, "-graph"), "train", graph=True), 2)
    assert curve(points, "loss") == curve(train_to(tiny_run, 2), "loss")
    assert "train.graph is off: it needs one worker, a GPU" in caplog.text
    assert checkpoint.read_meta(renamed(tiny_run, "-graph").locate_step(2))["graph"] is False


def test_a_gpu_that_is_too_small_is_told_what_to_change_and_not_tried_again(tiny_run, monkeypatch):
    fail = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(PipelineError, match=r"a training step.*train\.accumulate=2.*ddpm doctor"):
        train_to(change(tiny_run, "train", deterministic=True), 1)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(PipelineError, match=r"NLL of two images.*evaluate\.nll_batch_size"):
        Unit(UnitKind.NLL, fail, (), "NLL of two images").run(one_cpu().context)


def test_the_fewest_parts_that_fit_into_a_gpu_are_chosen_once_and_kept(tiny_run, monkeypatch):
    three = train_to(renamed(change(tiny_run, "train", accumulate=3), "-three"), 4)
    tiny_run = change(tiny_run, "train", accumulate=None)
    on_cpu = renamed(tiny_run, "-on-cpu")
    train_to(on_cpu, 2)
    monkeypatch.setattr(train, "_read_gpu_memory", lambda device: 24.0)
    for steps, chosen in ((2, 3), (4, 1)):  # the second GPU is larger
        monkeypatch.setattr(train, "choose_accumulate", lambda *_, chosen=chosen: chosen)
        points = train_to(tiny_run, steps)
    assert curve(points, "loss", "grad_norm") == curve(three, "loss", "grad_norm")
    for run, step, parts in ((on_cpu, 2, 1), (tiny_run, 4, 3)):
        assert checkpoint.read_meta(run.locate_step(step))["accumulate"] == parts


def test_steps_computed_again_are_logged_once_and_what_was_half_written_is_gone(tiny_run):
    torn = tiny_run.train / ".tmp-step_00000002-abc"  # of a killed group; checkpoints are large
    torn.mkdir(parents=True)
    (torn / checkpoint.STATE).write_bytes(b"half")
    before = train_to(tiny_run, 6)
    assert not torn.exists()
    for step in (4, 6):
        (tiny_run.locate_step(step) / checkpoint.META).unlink()
    with tiny_run.log.open("a") as file:
        file.write('{"step": 7, "ti')  # a writer killed in mid-line
    assert train_to(tiny_run, 6) == before
    assert [point["step"] for point in before] == [1, 2, 3, 4, 5, 6]
    metrics = before[0]["metrics"]
    assert metrics.keys() == {"train/loss", "train/grad_norm", "train/lr", "train/images_per_second"}
    assert metrics["train/lr"] == 0, "the first update has the rate zero"
    assert read_progress(tiny_run) == (6, before[-1]["metrics"]["train/loss"])


def stop_at(step):
    """A context under which training is asked to stop after `step`."""
    context = one_cpu().context
    asked = iter(range(1, step + 1))
    context.broadcast_number = lambda number: next(asked) == step
    return context


@pytest.mark.parametrize(("minutes", "expected"), [(None, [3, 5]), (1e-9, [1, 2, 3, 4, 5])])
def test_a_checkpoint_comes_by_time_and_before_a_node_is_taken_away(tiny_run, monkeypatch, minutes, expected):
    tiny_run = change(tiny_run, "train", checkpoint_every=100, checkpoint_minutes=minutes)
    untouched, save = renamed(tiny_run, "-untouched"), Mock(wraps=checkpoint.save_checkpoint)
    train_to(untouched, 5)
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    context, asked = one_cpu().context, iter(range(1, 6))
    context.will_lose_node = lambda: next(asked) >= 3
    train_to(tiny_run, 5, context)
    assert [call.args[3] for call in save.call_args_list] == expected
    assert next(asked) == 4, "the notice is heard once"
    assert_equal_states(tiny_run, untouched, 5)


@pytest.mark.parametrize(("stop", "warmup"), [(None, 2), (30, 0)])
def test_a_run_that_has_diverged_stops_and_keeps_the_last_good_checkpoint(tiny_run, stop, warmup):
    train_to(tiny_run, 2)
    wild = change(tiny_run, "train", lr=1e30, grad_clip=None, warmup_steps=warmup, log_every=100)
    wild = change(wild, "train", checkpoint_every=50 if stop else 5)
    with pytest.raises(PipelineError, match=r"loss became .* lower train\.lr"):
        train_to(wild, 40, stop_at(stop) if stop else None)
    assert checkpoint.find_newest_step(tiny_run, at_most=100) == 2


def test_a_run_stopped_between_two_points_has_an_untouched_runs_curve(tiny_run):
    tiny_run = change(tiny_run, "train", log_every=4, checkpoint_every=8)
    expected = curve(train_to(tiny_run, 8), "loss", "grad_norm")
    assert [step for step, *_ in expected] == [4, 8]
    for step in (1, 4, 5):
        stopped = renamed(tiny_run, f"-{step}")
        train_to(stopped, 8, stop_at(step))
        assert list_steps(stopped.train) == [step]
        assert curve(train_to(stopped, 8), "loss", "grad_norm") == expected
        assert_equal_states(stopped, tiny_run, 8)


def test_training_goes_on_while_a_checkpoint_is_written(tiny_run, monkeypatch):
    """The file holds the state of its step although the tensors have moved on meanwhile."""
    untouched = renamed(tiny_run, "-untouched")
    train_to(untouched, 6)
    stepped, write = threading.Event(), checkpoint.save_checkpoint

    def slow(directory, *args, **more):
        if directory == tiny_run.locate_step(2):
            assert stepped.wait(20), "training waited for the checkpoint"
        write(directory, *args, **more)

    class Log(train.LogWriter):
        def beat(self, step):
            if step == 3:
                stepped.set()

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    monkeypatch.setattr(train, "LogWriter", Log)
    train_to(tiny_run, 6)
    assert_equal_states(tiny_run, untouched, 2, 4, 6)


def test_grids_are_drawn_and_show_each_class_where_the_network_takes_labels(sharded_storage, monkeypatch):
    small = ["diffusion.timesteps=4", "sample.steps=null", "model.channels=8", "model.norm_groups=4"]
    often = ["train.batch_size=16", "train.sample_every=2", "evaluate.nll_timesteps=null"]
    forward = create_autospec(ContextUNet.forward, side_effect=ContextUNet.forward)
    monkeypatch.setattr(ContextUNet, "forward", forward)
    run = make_place(config.load_experiment("context_digits", [*small, *often]), sharded_storage)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(train, "save_grid", Mock(side_effect=OSError))  # killed while a grid is drawn
        train_to(change(run, "train", checkpoint_every=2), 4)
    forward.reset_mock()
    train_to(run, 4)
    calls = [call.args[1:] for call in forward.call_args_list if len(call.args[1]) == train.GRID_SIDE**2]
    assert sorted(path.name for path in run.grids.iterdir()) == ["00000002.png", "00000004.png"]
    assert all(labels[:12].tolist() == [*range(10), 0, 1] for _, _, labels in calls)
    assert torch.equal(calls[0][0], calls[len(calls) // 2][0]), "each grid begins with the same noise"


@pytest.mark.slow
def test_a_compiled_network_trains_the_same_run_up_to_rounding(tiny_run):
    expected, other = train_to(tiny_run, 3), renamed(tiny_run, "-compiled")
    points = train_to(change(other, "train", compile=True), 3)
    for name, rel in (("loss", 1e-4), ("grad_norm", 1e-3)):
        ours, theirs = (curve(its, name) for its in (points, expected))
        assert ours == [(step, pytest.approx(value, rel=rel)) for step, value in theirs]
    ours, theirs = (checkpoint.load_checkpoint(run.locate_step(3)) for run in (other, tiny_run))
    assert ours.keys() == theirs.keys(), "it does not say that it was compiled"

"""What a command takes of clusters of equal and unequal machines, and a training step of a GPU's memory."""

import re

import pytest

from pipeline.compute.interrupt import StopRequest
from pipeline.compute.memory import choose_accumulate, describe_step_memory, estimate_step_memory
from pipeline.compute.resources import count_fitting_workers, resolve_resources
from pipeline.compute.session import RaySession
from pipeline.config import load_cluster, load_experiment
from pipeline.errors import PipelineError


def cluster(asked):
    return load_cluster("local", [f"{key}={value}" for key, value in asked.items()])


CIFAR10, LSUN = 128 * 32**2, 64 * 256**2


@pytest.mark.parametrize(("asked", "nodes", "pixels", "expected"), [
    ({}, [(8, 0)], None, (2, 2, 4, 0)),
    ({}, [(16, 4)], CIFAR10, (4, 4, 4, 1)),
    ({}, [(128, 8)] * 8, CIFAR10, (4, 4, 16, 1)),  # not 64: each would get two images
    ({}, [(0, 0), *[(128, 8)] * 8], LSUN, (8, 8, 16, 1)),  # one machine; the head has nothing
    ({}, [(16, 1)], 16 * 8**2, (1, 1, 16, 1)),
    ({"workers": 64}, [*[(128, 8)] * 7, (64, 8)], CIFAR10, (64, 64, 8, 1)),
    ({"workers": 16}, [(32, 8), (128, 8)], None, (16, 16, 4, 1)),
    ({"workers": 2}, [(1, 0), (3, 0)], None, (2, 2, 1, 0)),
    ({"workers": 2}, [(128, 8)], None, (2, 2, 16, 1)),  # the other GPUs need CPUs too
    ({"workers": 4, "min_workers": 2, "cpus_per_worker": 1}, [(2, 0)], None, (4, 2, 1, 0)),
])  # fmt: skip
def test_what_is_taken_fits_machine_by_machine(asked, nodes, pixels, expected):
    found = resolve_resources(cluster(asked), nodes, pixels)
    one = (found.cpus_per_worker, found.gpus_per_worker)
    assert (found.workers, found.min_workers, *one) == expected
    assert count_fitting_workers(nodes, *one) >= found.min_workers


@pytest.mark.parametrize(("asked", "nodes", "may_come", "message"), [
    ({}, [(0, 0)], True, "1 worker with 1 CPUs .* lower cluster.workers"),
    ({"workers": 2, "cpus_per_worker": 2}, [(1, 0), (3, 0)], True, "2 workers with 2 CPUs .*1 x 3 CPUs"),
    ({"workers": 2}, [(8, 1)], True, "2 workers with .* 1 GPUs each .*1 x 8 CPUs . 1 GPUs"),
    ({"workers": 4, "min_workers": 3}, [(2, 0)], True, "3 workers with 1 CPUs"),
    ({"gpus_per_worker": 1}, [(2, 0)], True, "2 workers with 1 CPUs and 1 GPUs"),
    ({"gpus_per_worker": 2}, [(8, 1), (8, 1)], False, "1 worker with .* CPUs and 2 GPUs"),
    ({"cpus_per_task": 3}, [(2, 0), (2, 0)], False, "1 task with 3 CPUs .* lower .*cpus_per_task"),
])  # fmt: skip
def test_what_has_no_place_is_refused_or_waited_for(monkeypatch, capsys, asked, nodes, may_come, message):
    session = RaySession(cluster({**asked, "ray_address": "auto"}), is_interrupted=lambda: True)
    monkeypatch.setattr(session, "list_nodes", lambda: nodes)
    with pytest.raises(StopRequest if may_come else PipelineError, match=None if may_come else message):
        session._wait_for_nodes()
    assert bool(re.search(f"waiting .*{message}", capsys.readouterr().out)) is may_come
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(StopRequest):  # an autoscaler may have other machines
        session._wait_for_nodes()


def load_digits(*overrides):
    return load_experiment("digits", ["model.channel_mult=[1]", "model.attention_resolutions=[]", *overrides])


def test_the_need_at_any_accumulate_follows_from_two_steps():
    experiment = load_digits("train.batch_size=20000", "train.accumulate=4")
    text = describe_step_memory(experiment, workers=2)
    estimate = estimate_step_memory(experiment, 10_000, 4) / 2**30
    assert float(text.split()[0]) == pytest.approx(estimate, rel=0.03, abs=0.06)
    least = [int(parts) for parts in re.findall(r"GiB: (\d+)", text)]
    assert len(least) == 3 and least == sorted(least)
    kept, again = (estimate_step_memory(load_digits(f"model.recompute={n}"), 2000, 1) for n in (0, 1))
    assert again < 0.9 * kept


def test_the_least_accumulate_is_the_first_whose_peak_fits_into_nine_tenths_of_a_card():
    experiment = load_digits()
    peaks = {parts: estimate_step_memory(experiment, 2000, parts) / 2**30 for parts in (1, 3, 4)}
    assert choose_accumulate(experiment, 2000, card=peaks[1] / 0.89) == 1
    assert choose_accumulate(experiment, 2000, card=(peaks[3] + peaks[4]) / 2 / 0.9) == 4
    with pytest.raises(PipelineError, match=r"this one has 0\.0 GiB: use train\.precision"):
        choose_accumulate(experiment, 2000, card=0.001)

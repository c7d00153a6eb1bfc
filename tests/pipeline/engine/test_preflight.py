"""The needs of a run are known before it starts; tests/device compares the memory with fake CUDA tensors."""

import dataclasses
import shutil
from collections import namedtuple

import pytest
from conftest import one_cpu

from pipeline import config
from pipeline.engine import preflight
from pipeline.errors import PipelineError
from pipeline.stages import train
from pipeline.store import checkpoint
from pipeline.store.run import Place

Usage = namedtuple("Usage", "total used free")


LAST = {"evaluate.checkpoints": "null", "sample.checkpoint": "last"}


def cifar10(**changes):
    return config.load_experiment("cifar10", [f"{key}={value}" for key, value in (LAST | changes).items()])


def test_checkpoints_are_as_large_as_said(tiny_run):
    experiment, run = tiny_run.experiment, tiny_run
    one = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=2, keep=1))
    train.STAGE.run_worker(one_cpu().context, run.of(one))
    (written,) = (run.step_folder(step) for step in checkpoint.list_steps(run.train))
    found = sum(file.stat().st_size for file in written.iterdir())
    assert preflight.estimate_requirements(one).checkpoints / 2 == pytest.approx(found, rel=0.1)


def test_the_papers_run_takes_gibibytes_and_candidates_count():
    wanted = preflight.estimate_requirements(cifar10())
    assert wanted.checkpoints == 4 * 5 * 4 * 35_746_307
    assert wanted.features == 4 * (2048 + 1008) * 4 * 50_000
    assert 5 * 2**30 < wanted.disk < 6 * 2**30 and 1 * 2**30 < wanted.memory < 2 * 2**30
    plain = wanted
    wanted = preflight.estimate_requirements(cifar10(**{"evaluate.checkpoints": "every:50000"}))
    assert (plain.kept, plain.images) == (3, 50_000)
    assert (wanted.kept, wanted.images) == (3 + 15, 50_000 + 16 * 5_000)
    every = {"train.keep_every": 100_000, "evaluate.checkpoints": "all"}
    kept = preflight.estimate_requirements(cifar10(**every))
    assert (kept.kept, kept.images) == (3 + 7, 50_000 + 10 * 5_000)


def test_a_disk_that_is_too_small_is_refused_and_what_is_there_is_not_needed_again(tmp_path, monkeypatch):
    run = Place(tmp_path, cifar10(), "d", "r")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2**30))
    with pytest.raises(PipelineError, match=r"1\.0 GiB free, .* needs 5\.\d GiB more: .*cluster\.storage"):
        preflight.check_resources(run)
    run.path.mkdir()
    with (run.path / "samples").open("wb") as file:
        file.truncate(3 * 2**30)  # sparse
    run.reference_features.mkdir(parents=True)
    with (run.reference_features / "set.npz").open("wb") as file:
        file.truncate(2 * 2**30)
    assert preflight.check_resources(run).startswith("0.")

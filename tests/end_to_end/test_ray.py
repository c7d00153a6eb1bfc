"""The whole pipeline through a real local Ray with two DDP workers, beside the same run in one process."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ONE_CPU, TINY, read_losses
from test_exact_run import SOURCE, WORDS

from pipeline.cli.program import main

pytestmark = pytest.mark.ray

# 17 images a batch do not divide by two: the slices are uneven. 50 steps, dropout 0, fp32.
STEPS = ["train.steps=50", "train.batch_size=17", "train.checkpoint_every=25"]
SCORES = ["evaluate.metrics=[fid,nll]", "evaluate.features=projection", "figures.which=[samples,progressive]"]
EXPERIMENT = [*TINY, *STEPS, *SCORES, "diffusion.t_sampling=importance"]


def arguments(storage: Path, *words: str, verb: str) -> list[str]:
    return [verb, "digits", *EXPERIMENT, *words, f"cluster.storage={storage}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, empty_store) -> list[Path]:
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for storage in (one, two):
        shutil.copy(empty_store, storage)
    through_ray = arguments(two, "cluster.workers=2", "cluster.cpus_per_worker=1", verb="run")
    command = [sys.executable, "-m", "pipeline", *through_ray]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, **pipes) as other:
        assert main(arguments(one, *ONE_CPU, verb="evaluate")) == 0  # while Ray starts
        said, _ = other.communicate()
    assert other.returncode == 0, said
    return [path.parent for storage in (one, two) for path in storage.glob("tiny-*/experiment.yaml")]


def assert_same_files(ours: Path, theirs: Path, pattern: str) -> None:
    found, expected = (
        {path.relative_to(root): path.read_bytes() for path in root.glob(pattern)} for root in (ours, theirs)
    )
    assert found and found == expected, pattern


def test_one_and_two_workers_shard_train_and_score_alike(runs):
    one, two = map(read_losses, runs)
    assert len(one) == 50 and one == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in two]
    assert_same_files(runs[0].parent, runs[1].parent, "data/**/*.tar")
    (one,), (two,) = (list(run.glob("evaluation/*/metrics.json")) for run in runs)
    assert one.parent.name == two.parent.name
    a, b = (json.loads(path.read_text())["scores"]["nll_bpd"] for path in (one, two))
    assert math.isclose(a, b, rel_tol=1e-4) and list(runs[1].glob("report/report.html"))


def test_the_same_checkpoint_gives_the_same_samples_and_scores_through_ray(runs, tmp_path):
    shutil.copytree(runs[1].parent, tmp_path, dirs_exist_ok=True)
    copy = tmp_path / runs[1].name
    for folder in ("samples", "evaluation"):
        shutil.rmtree(copy / folder)
    assert main(arguments(tmp_path, *ONE_CPU, verb="evaluate")) == 0
    for pattern in ("samples/*/*.tar", "evaluation/*/metrics.json", "evaluation/*/nll.json"):
        assert_same_files(copy, runs[1], pattern)


@pytest.mark.slow
def test_two_workers_draw_the_bits_of_the_exact_network(tmp_path):
    np.save(tmp_path / "images.npy", SOURCE)
    tars = []
    for workers in (0, 2):
        words = [*WORDS, f"data.path={tmp_path}/images.npy", f"cluster.storage={tmp_path / str(workers)}"]
        command = [sys.executable, "-m", "pipeline", "sample", "digits", *words, f"cluster.workers={workers}"]
        subprocess.run(command, check=True)
        tars.append(sorted((tmp_path / str(workers)).glob("oracle-*/samples/*/*.tar")))
    assert tars[0] and [tar.read_bytes() for tar in tars[0]] == [tar.read_bytes() for tar in tars[1]]


def test_a_lack_of_memory_is_told_in_a_line():
    from pipeline.errors import shorten_error

    told = (
        "2 worker(s) were killed due to the node running low on memory. Memory on the node was 22.37GB used\n"
        "OOM kill reason: ...\nRefer to the documentation on how to address the out of memory issue: https://..."
    )
    assert shorten_error(RuntimeError(told)).endswith("low on memory. Memory on the node was 22.37GB used")
    assert shorten_error(RuntimeError("Traceback\n  ValueError: no\n")) == "ValueError: no"

"""However samples and scores are split over tasks, and whoever dies at it, the files are the same byte for byte."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import TINY, one_cpu
from staged import run_stage, with_weights

from pipeline.config import load_experiment
from pipeline.engine.find import make_place
from pipeline.scores import classifier, preparations
from pipeline.stages import shard
from pipeline.store.files import TEMPORARY, hash_file

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Untrained. Six units of samples, six of the bound, those of features: enough to be split, long enough to be killed.
EXPERIMENT = [
    *TINY,
    "diffusion.timesteps=60",
    "sample.num_images=36",
    "evaluate.metrics=[fid,fid_test,is,kid,prc,nll]",
    "evaluate.nll_images=24",
]
# Ray is told of as many CPUs as there are to be tasks at once, however many the machine has.
PROGRAM = """
import os, sys
os.sched_getaffinity = lambda pid: set(range(int(sys.argv[1])))
from pipeline.cli.program import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A storage root with the shards, a checkpoint and the classifier: what is not split."""
    storage = tmp_path_factory.mktemp("prepared")
    run = make_place(load_experiment("digits", EXPERIMENT), storage)
    run_stage(shard, run)
    with_weights(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", 20)
        preparations.train_classifier(one_cpu().context, run)
    return storage


def evaluation(storage: Path, tasks: int) -> subprocess.Popen:
    words = ["evaluate", "digits", *EXPERIMENT, f"cluster.storage={storage}", "cluster.cpus_per_task=1"]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tasks), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def made(storage: Path) -> dict[str, str]:
    """The sha256 of all that the split work leaves; what a killed task was writing, the next command removes."""
    files = [
        *storage.glob("tiny-*/samples/**/*.*"),
        *storage.glob("tiny-*/evaluation/**/*.*"),
        *storage.glob("data/*/references/**/*.npz"),
    ]
    whole = (file for file in files if not file.name.startswith(TEMPORARY))
    return {str(file.relative_to(storage)): hash_file(file) for file in whole}


@pytest.fixture(scope="module")
def by_one_task(prepared, tmp_path_factory) -> dict[str, str]:
    """What an evaluation by one task at a time leaves."""
    storage = tmp_path_factory.mktemp("one")
    shutil.copytree(prepared, storage, dirs_exist_ok=True)
    finish(evaluation(storage, 1))
    found = made(storage)
    endings = ("00005.tar", "metrics.json", "nll.json", "000020-000024.npz")
    assert all(any(name.endswith(ending) for name in found) for ending in endings)
    return found


@pytest.mark.parametrize("tasks", [2, 3])
def test_more_tasks_leave_the_same_files(prepared, by_one_task, tasks, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    finish(evaluation(tmp_path, tasks))
    assert made(tmp_path) == by_one_task


def test_a_killed_task_costs_one_unit_and_changes_nothing(prepared, by_one_task, tmp_path):
    """kill -9, once while samples are drawn and once while the bound is computed."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    process, killed = evaluation(tmp_path, 2), []
    for begun in ("tiny-*/samples/*/*.tar", "tiny-*/evaluation/units/nll-*/*.npz"):
        while not list(tmp_path.glob(begun)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        killed.append(kill_a_task(process))
    finish(process)
    assert len(set(killed)) == 2
    assert made(tmp_path) == by_one_task


def kill_a_task(driver: subprocess.Popen) -> int:
    """Kill a process that is working on a unit for this driver, and nobody else's; return its id."""
    while driver.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(driver.pid).children(recursive=True):
                if " ".join(process.cmdline()).startswith("ray::Actor.run"):
                    process.kill()
                    return process.pid
        time.sleep(0.01)
    raise AssertionError("no task was seen at work")

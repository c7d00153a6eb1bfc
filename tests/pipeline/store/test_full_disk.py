"""Stages on a disk that is full, or that became read-only, and that go on when a person has mended it."""

import dataclasses
import shutil
import subprocess
from functools import partial

import pytest
from conftest import one_cpu, read_files, tiny_experiment
from staged import run_stage

from pipeline.engine.find import make_place
from pipeline.errors import PipelineError
from pipeline.stages import sample, shard, train

STAGES = {
    "shard": lambda run: run_stage(shard, run),
    "train": lambda run: train.STAGE.run_worker(one_cpu().context, run),
    "sample": lambda run: run_stage(sample, run),
}
MADE = {"shard": "data/*/[!.]*", "train": "tiny-*/train/*/*.safetensors", "sample": "tiny-*/samples/*/*.tar"}


def mount(*words):
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=16m", "none", place):
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk):
    free = int(subprocess.check_output(["stat", "-f", "-c", "%a", disk])) * 4096
    (disk / "ballast").write_bytes(bytes(free - 8192))


FULL = (fill, lambda disk: (disk / "ballast").unlink(), "No space left on device")
READ_ONLY = (partial(mount, "-o", "remount,ro"), partial(mount, "-o", "remount,rw"), "Read-only file system")


@pytest.mark.parametrize(("stage", "fault"), [*((stage, FULL) for stage in STAGES), ("shard", READ_ONLY)])
def test_a_stage_says_what_is_wrong_and_goes_on_when_it_is_mended(disk, tmp_path, stage, fault):
    breaks, mends, words = fault
    run = make_place(tiny_experiment(), disk)
    elsewhere = dataclasses.replace(run, storage=tmp_path / "elsewhere")
    for earlier in list(STAGES)[: list(STAGES).index(stage)]:
        STAGES[earlier](elsewhere)
        shutil.copytree(elsewhere.storage, disk, dirs_exist_ok=True)

    breaks(disk)
    with pytest.raises(PipelineError, match=f"cannot be written .{words}.*the same command continues"):
        STAGES[stage](run)
    assert read_files(disk, MADE[stage]) == {} and not list(disk.rglob(".tmp-*"))

    mends(disk)
    for root in (run, elsewhere):
        STAGES[stage](root)
    assert read_files(disk, MADE[stage]) == read_files(tmp_path / "elsewhere", MADE[stage]) != {}

"""Writers and stages on a disk that is full, or that became read-only, and that go on when a person has mended it."""

import dataclasses
import subprocess

import pytest
import torch
from conftest import one_cpu, tiny_experiment
from staged import run_stage

from pipeline.engine.find import make_place
from pipeline.errors import PipelineError
from pipeline.stages import sample, shard, train
from pipeline.store import checkpoint, tars
from pipeline.store.files import write_atomically, write_text
from pipeline.store.tensors import save_tensors

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


def test_a_full_disk_is_named_and_nothing_half_written_stays(disk):
    fill(disk)
    message = r"big cannot be written .No space left.*the same command continues"
    with pytest.raises(PipelineError, match=message):
        write_text(disk / "big", "x" * 100_000)
    tensors = {"net.w": torch.zeros(100_000)}
    with pytest.raises(PipelineError, match=r"step_1 cannot be written .No space left"):
        checkpoint.save_checkpoint(disk / "step_1", tensors, tensors, 1)
    with (
        pytest.raises(PipelineError, match=r"weights cannot be written .No space left"),
        write_atomically(disk / "weights") as file,
    ):
        save_tensors(tensors, file)
    records = (tars.Record(f"{i:04d}", bytes(1000), None) for i in range(100))
    with pytest.raises(PipelineError, match=r"x.tar cannot be written .No space left"):
        tars.write_tar(disk / "x.tar", records)
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    write_text(disk / "small", "fits")


FAULTS = {
    "full": (fill, lambda disk: (disk / "ballast").unlink(), "No space left on device"),
    "read-only": (
        lambda disk: mount("-o", "remount,ro", disk),
        lambda disk: mount("-o", "remount,rw", disk),
        "Read-only file system",
    ),
}


def made(root, stage):
    files = [path for path in root.glob(MADE[stage]) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("stage", "fault"), [("shard", "full"), ("shard", "read-only"), ("train", "full"), ("sample", "full")]
)
def test_a_stage_says_what_is_wrong_and_goes_on_when_it_is_mended(disk, tmp_path, stage, fault):
    breaks, mends, words = FAULTS[fault]
    run = make_place(tiny_experiment(), disk)
    elsewhere = dataclasses.replace(run, storage=tmp_path / "elsewhere")
    for earlier in list(STAGES)[: list(STAGES).index(stage)]:
        for root in (run, elsewhere):
            STAGES[earlier](root)

    breaks(disk)
    with pytest.raises(PipelineError, match=f"cannot be written .{words}.*the same command continues"):
        STAGES[stage](run)
    assert made(disk, stage) == {} and not list(disk.rglob(".tmp-*"))

    mends(disk)
    for root in (run, elsewhere):
        STAGES[stage](root)
    assert made(disk, stage) == made(tmp_path / "elsewhere", stage) != {}

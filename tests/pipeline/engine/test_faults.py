"""What a damaged file of a finished run leads to: it is named, and made again as it was (kinds K1, K2, K8)."""

import json
import os
import shutil

import pytest
import torch
from conftest import blank_charts, flip_bit, one_cpu, tiny_experiment
from safetensors.torch import save_file

from pipeline.cli.status import format_status
from pipeline.engine.execute import run_trial_stages
from pipeline.engine.find import make_place
from pipeline.engine.plan import list_unfinished_stages
from pipeline.errors import PipelineError
from pipeline.report.compared_run import make_compared_runs
from pipeline.store import checkpoint, files
from pipeline.store.diffusers_layout import export_to_diffusers
from pipeline.store.files import hash_file, read_file_facts, read_sealed, write_json
from pipeline.store.selection import ScoreFile

EXPERIMENT = tiny_experiment(
    "name=faults", "train.sample_every=4", "train.keep=3", "sample.steps=5", "evaluate.metrics=[fid,nll]",
    "evaluate.features=projection", "figures.which=[samples,rate_distortion]", "figures.images=1",
)  # fmt: skip
# What holds when, and by what, something was made; and the page, which shows that.
RECORDS = ("timings.json", "spent.json", "commits.json", "experiment.yaml", "log.jsonl", ".lock")


def bring_up_to_date(place, *last):
    """Without the page, unless a test asks for it, and then without its charts: they take most of the time."""
    for stage in ("evaluate", "figures"):
        run_trial_stages(one_cpu(), place, stage)
    with blank_charts():
        for stage in last:
            run_trial_stages(one_cpu(), place, stage)


def files_of(place):
    found = [path for path in place.storage.rglob("*") if path.is_file() and path.parent != place.report]
    kept = [path for path in found if path.name not in RECORDS and path.name[0] != "."]
    return {str(path.relative_to(place.storage)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sharded_storage):
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(sharded_storage / "data", root / "data")
    place = make_place(EXPERIMENT, root)
    bring_up_to_date(place, "report")
    return place


@pytest.fixture
def place(finished, tmp_path):
    shutil.copytree(finished.storage, tmp_path / "runs")
    checkpoint.load_model.cache_clear()
    return make_place(EXPERIMENT, tmp_path / "runs")


def damage(place, pattern, change=None, keep_times=False):
    """Change the content of the last such file; without `change` it is one bit in the middle."""
    file = sorted(place.path.glob(pattern))[-1]
    times = file.stat()
    file.write_bytes(change(file.read_bytes())) if change else flip_bit(file, times.st_size // 2)
    if keep_times:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    return file


@pytest.mark.parametrize(("damages", "keep_times"), [
    # One damage of each stage at a time: what one stage makes again is no reason for another to do so.
    ({"sample": "samples/*/00001.tar", "evaluate": "evaluation/*/metrics.json",
      "train": "train/step_00000006/ema.safetensors", "shard": "../data/*/train-00000.tar",
      "figures": "figures/*/samples.png", "report": "report/report.html"}, False),
    ({"sample": "samples/*/grid.png", "evaluate": "evaluation/*/nll.json",
      "train": "train/step_00000006/meta.json", "shard": "../data/*/train-00000.json"}, False),
    ({"sample": "samples/*/manifest.json", "evaluate": "evaluation/*/manifest.json"}, False),
    ({"sample": "samples/*/00001.tar"}, True),  # the times of the file stay as they were
])  # fmt: skip
def test_a_flipped_bit_is_named_and_made_again(place, finished, damages, keep_times, caplog):
    damaged = [damage(place, pattern, keep_times=keep_times) for pattern in damages.values()]
    assert damages.keys() <= {stage.name for stage in list_unfinished_stages(place, "report")}
    bring_up_to_date(place, *damages.keys() & {"report"})
    assert all(file.name in caplog.text or file.parent.name in caplog.text for file in damaged)
    assert files_of(place) == files_of(finished)


def test_what_is_done_is_told_without_hashing_anything_large(place, finished, monkeypatch):
    others = [path for path in finished.storage.rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.stat().st_mode & 0o777 for path in others} == {0o666 & ~files.UMASK}
    assert list_unfinished_stages(place, "report") == []  # a copy has other times, and is sealed anew
    hashed = []
    monkeypatch.setattr(files, "hash_file", lambda path: hashed.append(path.suffix) or hash_file(path))
    assert list_unfinished_stages(place, "report") == []
    assert set(hashed) <= {".json", ".png", ".jsonl", ".yaml"}
    of_another_run(place.locate_step(6), run_key=None)  # as older versions wrote it
    assert list_unfinished_stages(place, "report") == []


def make_foreign(folder):
    save_file({"a": torch.zeros(3)}, folder / checkpoint.EMA)
    save_file({"net.a": torch.zeros(3)}, folder / checkpoint.STATE)
    facts = {name: read_file_facts(folder / name) for name in (checkpoint.EMA, checkpoint.STATE)}
    write_json(folder / checkpoint.META, {"step": 6, "files": facts})
    (folder / ".sealed.json").unlink()


def make_older(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_00000002"), folder)


def empty_list(folder):
    write_json(folder / checkpoint.META, {"files": {}, "step": 6})
    flip_bit(folder / checkpoint.EMA)


def of_another_run(folder, run_key="0" * 12):
    meta = json.loads((folder / checkpoint.META).read_text())
    del meta["run_key"]
    write_json(folder / checkpoint.META, meta | ({"run_key": run_key} if run_key else {}))
    (folder / ".sealed.json").unlink()


@pytest.mark.parametrize("change", [make_foreign, make_older, empty_list, of_another_run])
def test_a_checkpoint_of_another_is_named_and_trained_again(place, finished, change, caplog, tmp_path):
    change(place.locate_step(6))
    with pytest.raises(PipelineError, match="step_00000006"):
        export_to_diffusers(place, tmp_path / "exported", "ema", 6)
    bring_up_to_date(place)
    assert "step_00000006" in caplog.text
    assert files_of(place) == files_of(finished)


def test_cached_statistics_and_features_with_a_flipped_bit_are_made_again(place, finished):
    for pattern in ("../data/*/references/*-train.npz", "../data/*/projection/*.safetensors"):
        damage(place, pattern)
    shutil.rmtree(place.scores)
    bring_up_to_date(place)
    assert files_of(place) == files_of(finished)


def test_a_changed_score_is_neither_shown_nor_sent(place, caplog):
    damage(place, "evaluation/*/metrics.json", lambda text: text.replace(b'"nll_bpd": ', b'"nll_bpd": 1'))
    with pytest.raises(PipelineError, match=r"metrics\.json"):
        read_sealed(place.metrics_json, ScoreFile)
    (run,) = make_compared_runs([place])
    assert "nll_bpd" not in run.scores and "metrics.json" in caplog.text


SHAPELESS = (
    "samples/*/manifest.json", "samples/*/00000.json", "samples/*/.sealed.json", "../data/*/manifest.json",
    "evaluation/*/metrics.json", "evaluation/*/manifest.json", "figures/*/manifest.json", "report/manifest.json",
    "train/step_00000006/meta.json", "timings.json", "commits.json", "spent.json", "log.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("content", [b"null", b'{"files": {}}', b"\x80" + b"[" * 99999, b"a pipe"], ids=len)
def test_json_of_another_shape_is_no_traceback(place, content, undrawn):
    for pattern in SHAPELESS[: -1 if content == b"a pipe" else None]:  # a log is not begun anew
        file = damage(place, pattern, lambda _: content)
        if content == b"a pipe":
            file.unlink()
            os.mkfifo(file)
        format_status(place.storage)
        list_unfinished_stages(place, "report")
    bring_up_to_date(place, "report")
    assert list_unfinished_stages(place, "report") == []

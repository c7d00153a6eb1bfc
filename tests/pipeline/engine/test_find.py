"""Runs are found by experiment and by name, and their needs are known before they start."""

import errno
import fcntl
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import yaml
from conftest import one_cpu, tiny_experiment
from staged import change
from synthetic_run import make_run

from pipeline import config
from pipeline.cli.program import main
from pipeline.engine import find, preflight
from pipeline.engine.plan import list_required_stages
from pipeline.errors import PipelineError
from pipeline.stages import train
from pipeline.store.files import lock_folder
from pipeline.store.run import Place, list_steps


@contextmanager
def edit(run):
    tree = yaml.safe_load(run.experiment_yaml.read_text())
    yield tree
    run.experiment_yaml.write_text(yaml.safe_dump(tree))


def test_an_old_run_is_not_opened_and_whoever_meets_it_is_told_how_to_read_it(tmp_path, capsys):
    with edit(old_run := make_run(tmp_path)) as tree:
        del tree["made_with"]["keys"]
        tree["train"]["grad_clip_group"] = None  # an option that is gone
    assert main(["status", f"cluster.storage={old_run.storage}"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "first version" in told and "git worktree add" in told and "0123456789abcdef" in told
    with pytest.raises(PipelineError, match=r"first version of this program.*git worktree add"):
        find.read_place(old_run.path)
    fresh = Place(old_run.storage, tiny_experiment("name=digits"), "d" * 12, "e" * 12)
    (line,) = find.explain_unreadable_runs(fresh)
    assert old_run.name in line and "git worktree add" in line
    other = Place(old_run.storage, tiny_experiment("name=digit"), "d" * 12, "e" * 12)
    assert find.explain_unreadable_runs(other) == []


def test_runs_from_before_a_section_an_option_or_a_corrected_formula(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    assert find.read_place(run.path) == run
    with edit(run) as tree:
        del tree["published"], tree["train"]["keep_steps"], tree["sample"]["spacing"]
    assert find.read_place(run.path) == run
    with edit(run) as tree:
        del tree["evaluate"]["features"]  # which has no neutral value
    with pytest.raises(PipelineError, match=r"evaluate\.features is missing"):
        find.read_place(run.path)
    run = make_run(tmp_path)
    monkeypatch.setattr(find.keys, "make_run_key", lambda *_: "0" * 12)
    with pytest.raises(PipelineError, match=f"{run.name} .* formula was corrected"):
        find.read_place(run.path)
    (line,) = find.explain_unreadable_runs(Place(run.storage, run.experiment, run.data_key, "0" * 12))
    assert run.name in line


def test_the_beginning_of_a_name_means_a_run_where_it_is_the_only_one(tmp_path):
    for name in ("a-1", "a-2", "b-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.yaml").write_text("name: x\n")
    assert find.find_run("b", tmp_path) == find.find_run(str(tmp_path / "b-1"), Path()) == tmp_path / "b-1"
    assert len(find.find_named_runs("a", tmp_path)) == 2
    for name, told in (("a", "a-1, a-2"), ("c", "no run directory; runs in .*: a-1, a-2, b-1")):
        with pytest.raises(PipelineError, match=told):
            find.find_run(name, tmp_path)


@pytest.mark.parametrize(("last", "overrides", "names"), [
    ("shard", [], "shard"), ("train", [], "shard train"), ("sample", [], "shard train sample"),
    ("evaluate", [], "shard train evaluate"),  # the bound alone
    ("evaluate", ["evaluate.metrics=[fid]"], "shard train sample evaluate"),
    ("sample", ["evaluate.checkpoints=all", "sample.checkpoint=best"], "shard train select sample"),
    ("report", ["evaluate.checkpoints=all"], "shard train select sample evaluate figures report"),
    ("report", [], "shard train sample evaluate figures report"),
])  # fmt: skip
def test_a_stage_brings_what_it_needs(tmp_path, last, overrides, names):
    place = Place(tmp_path, tiny_experiment(*overrides), "d" * 12, "e" * 12)
    assert [stage.name for stage in list_required_stages(place, last)] == names.split()


@pytest.mark.parametrize(("module", "name", "broken", "expected"), [
    (fcntl, "flock", {}, "does not stop a second process"),
    (fcntl, "flock", {"side_effect": OSError(errno.ENOSYS, "")}, "mount the file system with locks"),
    (fcntl, "flock", {"side_effect": OSError(errno.ENOLCK, "")}, "mount the file system with locks"),
    (os, "fsync", {"side_effect": OSError(errno.EIO, "")}, "cannot be written"),
    (time, "time", {"return_value": 0.0}, "clock"),
])  # fmt: skip
def test_a_file_system_on_which_runs_fail_is_told(tmp_path, monkeypatch, module, name, broken, expected):
    assert find.find_storage_problems(tmp_path) == ""
    monkeypatch.setattr(module, name, Mock(**broken))
    assert expected in find.find_storage_problems(tmp_path) and not list(tmp_path.iterdir())


def test_a_machine_of_a_cluster_says_what_it_sees_amiss_in_the_storage_root(tmp_path):
    with lock_folder(tmp_path):
        assert find._check_folder(tmp_path) == ""
        assert "sees another folder there: mount" in find._check_folder(tmp_path / "nothing")
    assert "does not see who holds a lock: mount" in find._check_folder(tmp_path)


def cifar10(*words):
    return config.load_experiment("cifar10", ["evaluate.checkpoints=null", "sample.checkpoint=last", *words])


def test_checkpoints_are_as_large_as_said_and_candidates_count(tiny_run):
    run = change(tiny_run, "train", steps=2, keep=1)
    train.STAGE.run_worker(one_cpu().context, run)
    (step,) = list_steps(run.train)
    found = sum(file.stat().st_size for file in run.locate_step(step).iterdir())
    assert preflight.estimate_requirements(run.experiment).checkpoints / 2 == pytest.approx(found, rel=0.1)
    for words, count, images in (
        ([], 3, 50_000), (["evaluate.checkpoints=every:50000"], 3 + 15, 50_000 + 16 * 5_000),
        (["train.keep_every=100000", "evaluate.checkpoints=all"], 3 + 7, 50_000 + 10 * 5_000),
    ):  # fmt: skip
        wanted = preflight.estimate_requirements(cifar10(*words))
        assert (wanted.checkpoint_count, wanted.images) == (count, images)


def test_the_papers_run_takes_gibibytes_and_what_is_there_is_not_needed_again(tmp_path, monkeypatch):
    run = Place(tmp_path, cifar10(), "d", "r")
    wanted = preflight.estimate_requirements(run.experiment)
    assert wanted.checkpoints == 4 * 5 * 4 * 35_746_307
    assert wanted.features == 4 * (2048 + 1008) * 4 * 50_000
    assert 5 * 2**30 < wanted.disk < 6 * 2**30 and 1 * 2**30 < wanted.memory < 2 * 2**30
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    with pytest.raises(PipelineError, match=r"1\.0 GiB free, .* needs 5\.\d GiB more: .*cluster\.storage"):
        preflight.check_resources(run)
    for file, size in ((run.path / "samples", 3), (run.reference_features / "set.npz", 2)):
        file.parent.mkdir(parents=True)
        file.touch()
        os.truncate(file, size * 2**30)  # sparse
    assert preflight.check_resources(run).startswith("0.")

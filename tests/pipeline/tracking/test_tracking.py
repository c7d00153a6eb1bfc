"""The mirror against a real store and a server that is not there; logged models hold their weights."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import free_port, wait_until
from mlflow import MlflowClient
from safetensors.torch import load_file
from synthetic_run import BEGAN, make_run, write_checkpoint, write_scores

import pipeline
from ddpm import to_uint8
from pipeline import config, tracking
from pipeline.cli.program import main
from pipeline.engine.provenance import write_record
from pipeline.errors import PipelineError
from pipeline.store import files as rundir
from pipeline.store import tars
from pipeline.tracking import run_sender, ui
from pipeline.tracking.run_sender import RunSender

STEPS = ("train.steps=100", "train.checkpoint_every=50", "train.log_every=10")


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def uri(storage, empty_store) -> str:
    shutil.copy(empty_store, storage / "mlflow.db")
    return tracking.find_default_uri(storage)


@pytest.fixture(scope="module")
def client(uri):
    return MlflowClient(uri)


@pytest.fixture(scope="module")
def mirrored(storage, uri, client):
    """A whole run directory, delivered: (run, the MLflow run)."""
    run = make_run(storage, "digits", STEPS)
    write_scores(run.path / "evaluation" / "0123456789ab", run.experiment, scores={"fid": 20.5})
    with tracking.Mirror(uri, "digits", run, tags={"device": "cpu"}):
        pass
    return run, find(client, "digits", run)


def find(client, study, run):
    place = client.get_experiment_by_name(study).experiment_id
    (found,) = client.search_runs([place], f"tags.run_key = '{run.run_key}'")
    return found


def history(client, found, key):
    return [(p.step, p.timestamp) for p in client.get_metric_history(found.info.run_id, key)]


def expected(steps, every=10):
    return [(step, BEGAN + 85 * step) for step in range(every, steps + 1, every)]


def list_models(client, found):
    return client.search_logged_models([found.info.experiment_id], f"source_run_id = '{found.info.run_id}'")


def list_files(client, found, folder: str) -> list[str]:
    return [file.path for file in client.list_artifacts(found.info.run_id, folder)]


def test_what_may_not_change_is_a_parameter_and_the_rest_of_the_experiment_is_tags(mirrored, client):
    run, found = mirrored
    params, tags = found.data.params, found.data.tags
    settings = config.flatten(config.to_dict(run.experiment))
    assert settings.keys() - {"diffusion.betas"} <= params.keys() | tags.keys()
    assert not params.keys() & tags.keys()
    assert {"diffusion.beta_schedule": "linear", "model.dropout": "0.0"}.items() <= params.items()
    assert (params["data.train_images"], params["seed"]) == ("8", "0")
    wanted = {
        "sample.steps": "250", "train.steps": "100", "run_key": run.run_key, "data_key": run.data_key, "device": "cpu",
        "version.torch": "2.9", "mlflow.source.name": "ddpm", "protocol.comparable": "False", "protocol.n": "512",
    }  # fmt: skip
    assert wanted.items() <= tags.items() and tags["mlflow.user"]
    assert tags["commit"].startswith("0123") and "n = 512" in tags["protocol.why_not"]
    assert not any(key.startswith(("sample.", "evaluate.")) for key in params)
    name = run_sender.name_run(run.replace_experiment(dataclasses.replace(run.experiment, seed=7)))
    assert (found.info.run_name, name) == (run.name, f"{run.name} seed=7")
    wide = run.replace_experiment(config.load_experiment("digits", ["data.channels=3", "model.channels=16"]))
    assert run_sender.name_run(wide).count(" channels=") == 2
    study = client.get_experiment(found.info.experiment_id)  # the UI opens it as model training
    assert study.tags["mlflow.experimentKind"] == "custom_model_development"


def test_curves_scores_dataset_and_pictures_arrive_and_another_evaluation_is_a_child(mirrored, client):
    run, found = mirrored
    for key in ("loss/train", "train/lr", "train/grad_norm", "train/images_per_second"):
        assert history(client, found, key) == expected(100)
    assert found.info.start_time == BEGAN + 850 and found.info.status == "FINISHED"
    assert found.data.metrics["fid"] == 14.21 and found.data.metrics["nll_bpd"] == 4.52
    models = list_models(client, found)
    scored = {model.tags["step"]: {m.key: m.value for m in model.metrics or []} for model in models}
    assert scored["100"]["fid"] == 14.21 and scored["50"] == {}
    assert all(str(model.status) == "READY" and Path(model.tags["path"]).is_dir() for model in models)
    assert {output.step for output in found.outputs.model_outputs} == {50, 100}
    query = f"tags.mlflow.parentRunId = '{found.info.run_id}'"
    (child,) = client.search_runs([found.info.experiment_id], query)
    assert child.data.tags["evaluation_key"] == "0123456789ab"
    assert child.data.metrics == {"fid": 20.5} and child.info.status == "FINISHED"
    (used,) = found.inputs.dataset_inputs
    assert used.dataset.name == f"digits-{run.data_key}"
    assert used.dataset.digest == rundir.hash_file(run.data / "manifest.json")[:36]
    images = list_files(client, found, "images")
    assert sorted(int(path.split("+")[2]) for path in images if path.endswith(".png")) == [50, 100]
    assert all("samples~ema" in path for path in images)
    for path in ("experiment.yaml", "evaluation/nll.json", "samples/grid.png"):
        assert path in list_files(client, found, path.rpartition("/")[0])


def test_delivering_again_changes_nothing_but_completes_what_is_half_there(mirrored, client, uri, storage):
    run, found = mirrored
    images = list_files(client, found, "images")
    assert len(images) == 4, "two pictures, each with a small twin"
    for twin in (storage / "mlartifacts" / "digits").rglob("*+step+50+*.webp"):
        twin.unlink()
    for scores in run.path.glob("evaluation/*/metrics.json"):
        os.utime(scores, (1, 1))  # as if copied: no second point
    summary = tracking.deliver_run(uri, "digits", run)
    assert "log" in summary and "2 x grid" in summary
    after = find(client, "digits", run)
    assert history(client, after, "loss/train") == expected(100)
    assert len(history(client, after, "fid")) == 1
    assert sorted(list_files(client, found, "images")) == sorted(images)
    assert (after.data.params, after.info.status) == (found.data.params, found.info.status)
    assert len(after.outputs.model_outputs) == 2


@pytest.mark.parametrize(("error", "status"), [
    (RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (None, "FINISHED"),
])  # fmt: skip
def test_the_status_is_right_at_every_end_in_the_same_run(storage, uri, client, error, status):
    run = make_run(storage, "digits", (*STEPS, "seed=1"), scores=False)
    with pytest.raises(error) if error else nullcontext(), tracking.Mirror(uri, "ends", run) as mirror:
        wait_until(lambda: mirror.sender and find(client, "ends", run).info.status == "RUNNING")
        if error:
            raise error
    found, where = find(client, "ends", run), tracking.describe_delivery(run, uri)
    assert found.info.status == status
    assert "viewStateShareKey=scores" in where and "ddpm ui" in where and "sync" not in where


def test_while_a_run_lasts_its_machine_is_watched(storage, uri, client, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.mirror.POLL", 0.02)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    run = make_run(storage, "digits", (*STEPS, "seed=2"), scores=False)

    def list_steps() -> list[int]:
        points = history(client, find(client, "ends", run), "system/cpu_utilization_percentage")
        return [step for step, _ in points]

    for known in (0, 1):  # a run that goes on adds to its curve
        with tracking.Mirror(uri, "ends", run) as mirror:
            wait_until(lambda known=known: mirror.sender and mirror.record and len(list_steps()) > known)
    assert list_steps() == list(range(len(list_steps())))
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}


def test_a_storage_root_that_was_moved_takes_its_pictures_along(tmp_path, empty_store):
    before, after = tmp_path / "before root", tmp_path / "after"
    run = make_run(before, "digits", STEPS)
    shutil.copy(empty_store, before / "mlflow.db")
    tracking.deliver_run(tracking.find_default_uri(before), "digits", run)
    before.rename(after)
    uri, moved = tracking.find_default_uri(after), dataclasses.replace(run, storage=after)
    tracking.check_server(uri)
    client = MlflowClient(uri)
    found = find(client, "digits", moved)
    (picture, *_) = list_files(client, found, "images")
    assert Path(client.download_artifacts(found.info.run_id, picture)).stat().st_size > 0
    assert history(client, found, "loss/train") == expected(100)
    places = [found.info.artifact_uri, *(model.artifact_location for model in list_models(client, found))]
    assert all(place.startswith(after.as_uri()) for place in places)  # what follows is written there


def test_artifacts_that_lie_elsewhere_are_left_there(tmp_path, empty_store):
    run = make_run(tmp_path / "root", "digits", STEPS)
    shared = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    tracking.deliver_run(shared, "digits", run)
    (tmp_path / "mlartifacts").mkdir()
    tracking.check_server(shared)
    place = MlflowClient(shared).get_experiment_by_name("digits").artifact_location
    assert place == (tmp_path / "root" / "mlartifacts" / "digits").as_uri()


def test_pruned_checkpoints_leave_and_a_run_deleted_in_the_ui_is_delivered_anew(storage, uri, client):
    run = make_run(storage, "digits", (*STEPS, "seed=4"), scores=False)

    def mirror():
        with tracking.Mirror(uri, "ends", run):
            pass
        return find(client, "ends", run)

    mirror()
    shutil.rmtree(run.locate_step(50))
    write_checkpoint(run, 150)
    found = mirror()
    assert {model.tags["step"] for model in list_models(client, found)} == {"100", "150"}
    client.delete_run(found.info.run_id)
    assert history(client, mirror(), "loss/train") == expected(100)


def test_a_server_that_fails_in_the_middle_gets_every_whole_line_once(storage, uri, client, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.mirror.POLL", 0.02)
    run = make_run(storage, "digits", (*STEPS, "seed=5"), scores=False)
    with run.log.open("a") as file:
        file.write('{"step": 110, "time": 1, "met')
    monkeypatch.setattr("pipeline.tracking.parcels.LOG_BYTES", 500)  # of 1,900
    failures, starts, send_log = [], [], RunSender.send_log

    def fail_at_first(sender: RunSender, start: int, end: int) -> None:
        starts.append(start)
        is_first = start == 0 or len(failures) == 3  # what has arrived before is not sent again
        send_log(sender, start, end if is_first else (start + end) // 2)
        if not is_first:
            failures.append(end)
            raise ConnectionError("the server went away after half of it")

    monkeypatch.setattr(RunSender, "send_log", fail_at_first)
    warnings: list[str] = []
    with tracking.Mirror(uri, "ends", run, warn=warnings.append):
        wait_until(lambda: len(failures) == 3)
    found = find(client, "ends", run)
    assert history(client, found, "loss/train") == expected(100) and found.info.status == "FINISHED"
    assert len(warnings) == 1 and "went away" in warnings[0] and starts.count(0) == 1 and len(set(starts)) > 2
    for server, is_done in ((uri, True), ("http://other", False)):
        assert (not tracking.Mirror(server, "ends", run).list_missing()) is is_done


def test_a_taken_port_is_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(PipelineError, match=rf"port {port} .*ddpm ui --port {port + 1}"):
            ui.serve_ui(tmp_path, port)


@pytest.fixture
def own_uri(tmp_path, empty_store) -> str:
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


def test_a_registered_model_draws_its_samples_and_exports(sampled, own_uri, tmp_path, capsys, monkeypatch):
    run = sampled
    write_record(run, ())
    where = [f"cluster.tracking_uri={own_uri}", f"cluster.storage={run.storage}"]
    for _ in range(2):
        assert main(["register", run.name, "--alias", "champion", "--name", "digits", *where]) == 0
    assert "models:/digits@champion: ema weights of step 6" in capsys.readouterr().out
    (version,) = MlflowClient(own_uri).search_model_versions("name='digits'")
    tags = MlflowClient(own_uri).get_logged_model(version.source.removeprefix("models:/")).tags
    assert json.loads(tags["mlflow.modelVersions"]) == [{"name": "digits", "version": version.version}]
    mlflow.set_tracking_uri(own_uri)
    model = mlflow.pyfunc.load_model("models:/digits@champion")
    stored, _ = tars.load_images(run.samples, "samples")
    drawn = model.predict({"n": 12})
    assert drawn.shape == (12, 8, 8, 1) and drawn.dtype == np.uint8
    assert np.abs(drawn.transpose(0, 3, 1, 2).astype(int) - stored).max() <= 1  # other images share the batch
    assert not np.array_equal(model.predict({"n": 12, "seed": 1, "steps": 5}), drawn)
    mlflow.set_tracking_uri(None)  # as in another process, in a folder without a store
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["draw", "models:/digits@champion", str(tmp_path / "drawn.npz"), "-n", "12", *where]) == 0
    (array,) = np.load(tmp_path / "drawn.npz").values()
    assert np.array_equal(array.reshape(drawn.shape), drawn)
    for name in (run.name, "models:/digits@champion", f"models:/digits/{version.version}"):
        assert main(["export", name, str(tmp_path / f"out{len(name)}"), *where]) == 0
    files = [load_file(path) for path in sorted(tmp_path.glob("out*/unet/*.safetensors"))]
    assert len(files) == 3 and all(torch.equal(files[0][key], each[key]) for each in files for key in each)
    assert not mlflow.is_tracking_uri_set(), "the caller's own stays"
    assert "MLFLOW_TRACKING_URI" not in os.environ
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own_uri)
    again = pipeline.load("models:/digits@champion").sample(12)
    assert np.array_equal(to_uint8(again).permute(0, 2, 3, 1), drawn)
    for wrong in ("digits@nobody", "digits/99", "digits/new", "nobody/1", "m-0123", "", "/x/y", "a@", "a/b"):
        assert main(["export", f"models:/{wrong}", str(tmp_path / "none"), *where]) in (1, 2)
        (error,) = capsys.readouterr().err.splitlines()
        assert f"models:/{wrong}" in error and ("register" in error or "NAME@ALIAS" in error)


@pytest.mark.slow
def test_what_is_registered_at_a_server_draws_from_there(sampled, tmp_path, monkeypatch):
    write_record(sampled, ())
    address, words = f"http://127.0.0.1:{free_port()}", ["mlflow", "server", "--workers=1"]
    words += [f"--port={address[17:]}", f"--backend-store-uri=sqlite:///{tmp_path / 'server.db'}"]
    words += [f"--artifacts-destination={tmp_path / 'artifacts'}"]
    command = [sys.executable, "-m", *words]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while server.poll() is None:
            with suppress(PipelineError):
                tracking.check_server(address)
                break
            time.sleep(0.5)
        where = [f"cluster.tracking_uri={address}", f"cluster.storage={sampled.storage}"]
        assert main(["register", sampled.name, "--alias", "champion", "--name", "digits", *where]) == 0
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        shutil.move(sampled.path / "train", tmp_path / "train")  # the weights come from the server
        drawn = mlflow.pyfunc.load_model("models:/digits@champion").predict({"n": 2})
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    assert drawn.shape == (2, 8, 8, 1) and drawn.dtype == np.uint8 and drawn.std() > 0


@pytest.mark.parametrize(("limit", "held"), [(0, set()), (10_000, set()), (2**30, {"6"})])
def test_weights_are_copied_up_to_a_size_and_models_say_which_hold_them(sampled, own_uri, limit, held):
    run = sampled
    write_record(run, ())
    with tracking.Mirror(own_uri, run.name, run, largest_model=limit) as mirror:
        pass
    assert not mirror.list_missing()
    study = MlflowClient(own_uri).get_experiment_by_name(run.name).experiment_id
    models = MlflowClient(own_uri).search_logged_models([study])
    assert {model.tags["step"] for model in models if model.tags.get("weights") == "ema"} == held


def test_a_study_reads_its_trials_page_by_page_and_sends_each_rung_once(own_uri, tmp_path):
    parent = tracking.ParentRun(own_uri, "study", tmp_path, pytest.fail, "fid", larger_is_better=False)
    parent.connect()
    client, search, asked = parent.client, parent.client.search_runs, []
    trials = {key: [(2, 3.5, 1)] for key in "abc"}
    make, tags = tracking.mlflow_client.ensure_run, {tracking.PARENT_TAG: parent.run_id}
    ids = {key: make(client, parent.experiment_id, key, tags | {tracking.TRIAL_TAG: key}, 1) for key in "abc"}
    client.search_runs = lambda *words, **more: asked.append(more) or search(*words, max_results=2, **more)
    parent.start(tmp_path / "mlflow.db", trials)
    assert len(asked) == 2
    for rungs in (trials, trials, {**trials, "b": [*trials["b"], (4, 3.0, 2)]}):
        parent.send_leaderboard([{"a": 1}], "", {}, {}, rungs)
    assert len(asked) == 2, "the children are known"
    got = {key: [p.step for p in client.get_metric_history(run, "rung/nll_bpd")] for key, run in ids.items()}
    assert got == {"a": [2], "b": [2, 4], "c": [2]}

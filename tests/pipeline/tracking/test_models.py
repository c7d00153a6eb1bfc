"""Logged models hold their weights: what comes out of MLflow draws the images of its run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import mlflow
import numpy as np
import pytest
import torch
from conftest import free_port
from mlflow import MlflowClient
from safetensors.torch import load_file

import pipeline
from ddpm import to_uint8
from pipeline import tracking
from pipeline.cli.program import main
from pipeline.engine.provenance import write_record
from pipeline.errors import PipelineError
from pipeline.store import tars


@pytest.fixture
def uri(tmp_path, empty_store) -> str:
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


def test_a_registered_model_draws_its_samples_and_is_exported(sampled, uri, tmp_path, capsys, monkeypatch):
    run = sampled
    write_record(run, ())
    where = [f"cluster.tracking_uri={uri}", f"cluster.storage={run.storage}"]
    for _ in range(2):
        assert main(["register", run.name, "--alias", "champion", "--name", "digits", *where]) == 0
    assert "models:/digits@champion: ema weights of step 6" in capsys.readouterr().out
    (version,) = MlflowClient(uri).search_model_versions("name='digits'")
    mlflow.set_tracking_uri(uri)
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
    mlflow.set_tracking_uri(None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    again = pipeline.load("models:/digits@champion").sample(12)
    assert np.array_equal(to_uint8(again).permute(0, 2, 3, 1), drawn)
    assert main(["export", "models:/digits@nobody", str(tmp_path / "none"), *where]) == 1
    assert "models:/digits@nobody cannot be fetched" in capsys.readouterr().err


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
def test_weights_are_copied_up_to_a_size_and_models_say_which_hold_them(sampled, uri, limit, held):
    run = sampled
    write_record(run, ())
    with tracking.Mirror(uri, run.name, run, largest_model=limit) as mirror:
        pass
    assert not mirror.list_missing()
    study = MlflowClient(uri).get_experiment_by_name(run.name).experiment_id
    models = MlflowClient(uri).search_logged_models([study])
    assert {model.tags["step"] for model in models if model.tags.get("weights") == "ema"} == held

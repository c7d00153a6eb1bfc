"""Sweeps through a real local Ray: more trials than slots, a browser's MLflow, and a driver that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GRID, TRIAL, wait_until
from mlflow import MlflowClient

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SMALL = [*TRIAL, "train.sample_every=6", "cluster.cpus_per_worker=1"]


def start(storage: Path, text: str = GRID) -> subprocess.Popen:
    """`ddpm sweep` on a file grid.yaml of that text."""
    path = storage / "grid.yaml"
    path.write_text(text)
    command = [sys.executable, "-m", "pipeline", "sweep", str(path), *SMALL, f"cluster.storage={storage}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, **pipes)


def sweep(storage: Path, text: str = GRID) -> str:
    """Run `ddpm sweep` to its end; returns what it printed."""
    running = start(storage, text)
    said, _ = running.communicate()
    assert running.returncode == 0, said
    return said


def board(storage: Path) -> list[dict]:
    return json.loads((storage / "sweeps" / "grid" / "leaderboard.json").read_text())["trials"]


def children(storage: Path) -> list:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    place = client.get_experiment_by_name("grid").experiment_id
    return client.search_runs([place], "tags.`sweep.trial` != ''")


def trained(storage: Path) -> dict[str, int]:
    """When each finished trial's weights were written."""
    files = storage.glob("*/train/step_00000006/state.safetensors")
    return {path.parts[-4]: path.stat().st_mtime_ns for path in files}


def test_four_trials_in_the_room_for_one_worker_each_all_finish(tmp_path):
    """Twice as many trials as CPUs: were trials to hold CPUs of their own, none could start its worker."""
    said = sweep(tmp_path)
    rows = board(tmp_path)
    assert rows[0]["rank"][0] == "1" and {row["state"] for row in rows} == {"finished"}
    found = children(tmp_path)
    assert {child.info.status for child in found} == {"FINISHED"} and len(found) == 4
    scores = {child.data.tags["sweep.trial"]: child.data.metrics["nll_bpd"] for child in found}
    assert scores == {row["trial"]: row["scores"]["nll_bpd"] for row in rows}
    assert "Trial" not in said and "╭" not in said, "Ray has nothing to say beside the sweep"
    assert said.count("shard: done") == 1
    assert not (tmp_path / "sweeps" / "grid" / "ray").exists()
    began = time.monotonic()
    said = sweep(tmp_path)
    assert "4 done, 0 to do" in said and "starting Ray" not in said
    assert time.monotonic() - began < 120


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_driver_is_resumed_without_repeating_a_finished_trial(tmp_path, number):
    first, state = start(tmp_path), tmp_path / "sweeps" / "grid" / "state.json"

    def trials() -> list[dict]:
        return list(json.loads(state.read_text())["trials"].values()) if state.exists() else []

    wait_until(lambda: {"finished", "running"} <= {trial["state"] for trial in trials()}, 600, first)
    finished = {trial["run"] for trial in trials() if trial["state"] == "finished"}
    before = {run: when for run, when in trained(tmp_path).items() if run in finished}
    first.send_signal(number)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == (-9 if number == signal.SIGKILL else 130), said
    if number == signal.SIGINT:
        assert "RUNNING" not in {child.info.status for child in children(tmp_path)}
    assert "to do" in sweep(tmp_path)
    assert [trial["state"] for trial in trials()] == ["finished"] * 4
    assert before and before.items() <= trained(tmp_path).items()
    found, client = children(tmp_path), MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert len(found) == 4 and {child.info.status for child in found} == {"FINISHED"}
    for child in found:
        history = client.get_metric_history(child.info.run_id, "loss/train")
        assert sorted(point.step for point in history) == [1, 2, 3, 4, 5, 6]


def test_rungs_stop_trials_through_ray(tmp_path):
    text = "experiment: digits\nspace: {train.lr: [1.0e-3, 2.0e-3, 1.0e-9, 2.0e-9]}\nrank: {metric: nll_bpd}"
    sweep(tmp_path, text + "\nearly_stop: {first: 2, factor: 2, nll_images: 4}\nconcurrent: 1\n")
    states = {row["label"]: (row["state"], row["step"]) for row in board(tmp_path)}
    # After two steps an untrained network (bound 7.1305) is better than one that began with large steps (7.1337).
    assert states["lr=0.002"] == ("stopped", 2) and ("finished", 6) in states.values()

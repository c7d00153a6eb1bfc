"""Whole small studies in one process (cluster.workers=0): real stages, real files, a real MLflow store."""

import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import GRID, ONE_CPU, TRIAL, blank_charts
from mlflow import MlflowClient
from synthetic_run import make_run, write_scores

from pipeline import config, tracking
from pipeline.cli.program import main
from pipeline.engine import provenance
from pipeline.store.files import lock_folder, read_json, write_json
from pipeline.sweep import recorder
from pipeline.sweep.definition import load_sweep
from pipeline.sweep.leaderboard import format_text, make_rows
from pipeline.sweep.points import Trial, TrialState, TrialStates
from pipeline.sweep.recorder import StudyRecorder

SPACE = "experiment: digits\nspace:\n  diffusion.beta_schedule: %s\n  model.dropout: %s\nrank: {metric: nll_bpd}\n"
ONE_KEY = "experiment: digits\nspace:\n  %s: %s\nrank: {metric: nll_bpd}\n"


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Iterator[Path]:
    with blank_charts():
        yield tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def client(storage, empty_store) -> MlflowClient:
    shutil.copy(empty_store, storage)
    return MlflowClient(tracking.find_default_uri(storage))


def sweep(storage: Path, name: str, text: str, *words: str) -> int:
    path = storage / f"{name}.yaml"
    path.write_text(text)
    small = [*TRIAL, "train.sample_every=6"]
    own = [word for word in small if f"  {word.partition('=')[0]}:" not in text]
    return main(["sweep", str(path), *own, *ONE_CPU, f"cluster.storage={storage}", *words])


@pytest.fixture(scope="module")
def grid(storage, client) -> Path:
    assert sweep(storage, "grid", GRID) == 0
    return storage / "sweeps" / "grid"


def board(storage: Path, name: str) -> list[dict]:
    return read_json(storage / "sweeps" / name / "leaderboard.json", dict)["trials"]


def parent_and_children(client: MlflowClient, name: str):
    runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    (parent,) = (run for run in runs if run.data.tags.get("sweep.role") == "parent")
    children = [run for run in runs if run.data.tags.get(tracking.PARENT_TAG) == parent.info.run_id]
    assert len(children) == len(runs) - 1, "rungs and other evaluations are no rows beside the trials"
    return parent, {child.data.tags[tracking.TRIAL_TAG]: child for child in children}


def trained(storage: Path) -> dict[str, int]:
    return {path.parts[-4]: path.stat().st_mtime_ns for path in storage.glob("*/train/*/state.safetensors")}


def test_the_leaderboard_ranks_every_trial_by_its_own_score(grid, storage):
    rows = board(storage, "grid")
    assert rows[0]["rank"][0] == "1" and {row["state"] for row in rows} == {"finished"}
    bounds = [row["scores"]["nll_bpd"] for row in rows]
    assert bounds == sorted(bounds)
    for row in rows:
        (metrics,) = (storage / row["run"]).glob("evaluation/[0-9a-f]*/metrics.json")
        assert read_json(metrics, dict)["scores"]["nll_bpd"] == row["scores"]["nll_bpd"]
        experiment = config.load_experiment(str(storage / row["run"] / "experiment.yaml"), [])
        assert experiment.model.dropout == row["swept"]["model.dropout"]
    text = (grid / "leaderboard.md").read_text()
    assert "6 of 360 test images; not comparable" in text and "lowest NLL" in text


def test_the_server_shows_who_won_and_the_trials_side_by_side(grid, storage, client, monkeypatch):
    parent, children = parent_and_children(client, "grid")
    rows, tags = board(storage, "grid"), parent.data.tags
    best = rows[0]
    assert parent.info.status == "FINISHED" and len(children) == 4
    view = json.loads(client.get_experiment(parent.info.experiment_id).tags["mlflow.sharedViewState.trials"])
    assert (
        view["orderByKey"] == "metrics.`nll_bpd`"
        and view["orderByAsc"] is True
        and "trial" in view["searchFilter"]
    )
    assert tags["best_trial"] == best["label"] and best["label"] in tags["mlflow.note.content"]
    assert tags["best.diffusion.beta_schedule"] == best["swept"]["diffusion.beta_schedule"]
    assert parent.data.metrics["best/nll_bpd"] == best["scores"]["nll_bpd"]
    # load_table asks the global one
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.find_default_uri(storage))
    table = client.load_table(parent.info.experiment_id, "leaderboard.json", [parent.info.run_id])
    assert list(table["rank"]) == [row["rank"] for row in rows]  # replaced at every trial, not appended to
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"sweep.yaml", "leaderboard.json", "report"} <= names
    for row in rows:
        child = children[row["trial"]]
        assert child.info.status == "FINISHED" and child.info.run_name == row["label"]
        assert float(child.data.params["model.dropout"]) == row["swept"]["model.dropout"]
        assert child.data.tags["diffusion.beta_schedule"] == row["swept"]["diffusion.beta_schedule"]
        assert child.data.metrics["nll_bpd"] == row["scores"]["nll_bpd"]
        assert child.data.tags[tracking.STATE_TAG] == "finished"
        assert "samples/grid.png" in {f.path for f in client.list_artifacts(child.info.run_id, "samples")}
        assert client.list_artifacts(child.info.run_id, "images")
    # A trial of more than ten seconds has MLflow's measurements of the machine too.
    ours = [{n for n in child.data.metrics if not n.startswith("system/")} for child in children.values()]
    assert all(names == ours[0] for names in ours)


def test_the_same_command_again_repeats_nothing_and_status_knows_the_study(grid, storage, client, capsys):
    before = trained(storage)
    assert sweep(storage, "grid", GRID) == 0
    assert trained(storage) == before and "4 done, 0 to do" in capsys.readouterr().out
    assert len(parent_and_children(client, "grid")[1]) == 4
    assert main(["status", f"cluster.storage={storage}"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("grid", "4/4", *board(storage, "grid")[0]["label"].split()))
    with lock_folder(grid):
        assert sweep(storage, "grid", GRID) == 1
    assert "sweeps/grid is being worked on by another command" in capsys.readouterr().err


def test_a_dry_run_starts_nothing_and_says_what_it_would_take(grid, storage, capsys):
    assert sweep(storage, "grid", SPACE % ("[linear, cosine, quad]", "[0.0, 0.2]"), "--dry-run") == 0
    said = capsys.readouterr().out
    assert "6 trials, 2 to do" in said and "finished     linear dropout=0.0" in said
    assert "new          quad dropout=0.2" in said and "time left: about" in said
    assert len(board(storage, "grid")) == 4
    assert sweep(storage, "fresh", SPACE % ("[quad]", "[0.4]"), "--dry-run", "cluster.workers=1") == 0
    said = capsys.readouterr().out
    assert "unknown until a trial has finished" in said and "1 at a time, each 1 worker with 1 CPU" in said
    assert not (storage / "sweeps" / "fresh").exists()


def test_new_points_are_run_and_vanished_ones_marked(grid, storage, client):
    def removed() -> dict[str, bool]:
        _, children = parent_and_children(client, "moving")
        runs = [child.data for child in children.values()]
        return {run.params["model.dropout"]: "sweep.removed" in run.tags for run in runs}

    assert sweep(storage, "moving", SPACE % ("[linear]", "[0.0, 0.2]")) == 0
    before = trained(storage)  # made for the other study: nothing was trained for this one
    assert sweep(storage, "moving", SPACE % ("[linear]", "[0.2, 0.4]")) == 0
    assert len(trained(storage)) == len(before) + 1 and trained(storage).items() >= before.items()
    assert removed() == {"0.0": True, "0.2": False, "0.4": False} and len(board(storage, "moving")) == 2
    assert sweep(storage, "moving", SPACE % ("[linear]", "[0.0]")) == 0
    assert removed() == {"0.0": False, "0.2": True, "0.4": True}


def test_points_of_one_run_share_its_training(grid, storage, client):
    before = trained(storage)
    assert sweep(storage, "steps", ONE_KEY % ("sample.steps", "[5, 10]")) == 0
    assert trained(storage) == before
    rows = board(storage, "steps")
    assert len({row["run"] for row in rows}) == 1 and len({row["trial"] for row in rows}) == 2
    _, children = parent_and_children(client, "steps")
    assert {child.data.params["sample.steps"] for child in children.values()} == {"5", "10"}


def test_a_failing_trial_stops_no_other_and_is_tried_again(grid, storage, client, capsys):
    text = ONE_KEY % ("train.lr", "[1.0e+30, 1.0e-3]")
    assert sweep(storage, "failing", text) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: lr=1e+30 failed: the training loss became") and error.count("\n") == 1
    parent, children = parent_and_children(client, "failing")
    good, bad = board(storage, "failing")
    assert (good["state"], bad["state"], bad["rank"]) == ("finished", "failed", None)
    failed = children[bad["trial"]]
    assert failed.info.status == "FAILED" and children[good["trial"]].info.status == "FINISHED"
    assert "training loss became" in failed.data.tags["sweep.reason"]
    assert "failed: the training loss" in parent.data.tags["mlflow.note.content"]
    assert sweep(storage, "failing", text) == 1
    assert "lr=1e+30: started" in capsys.readouterr().out
    assert sweep(storage, "impossible", ONE_KEY % ("evaluate.nll_images", "[6, 5000]")) == 1
    assert "the test split has 360" in board(storage, "impossible")[1]["reason"], "before it trains"


def test_trials_of_other_code_are_not_gone_on_with_unasked(storage, monkeypatch, capsys):
    text = ONE_KEY % ("train.lr", "[2.0e-3]")
    assert sweep(storage, "coded", text) == 0
    monkeypatch.setattr(provenance, "hash_code", lambda *own: "0" * 8)
    assert sweep(storage, "coded", text, "train.steps=8") == 1
    assert "--accept-code" in capsys.readouterr().err
    assert sweep(storage, "coded", text, "train.steps=8", "--accept-code") == 0


STOPPING = SPACE % ("[cosine, linear%s]", "[0.5]") + "early_stop: {first: 2, factor: 2, nll_images: 4}\n"


def test_trials_that_are_not_worth_it_are_stopped_at_a_rung(storage, client, capsys):
    """Two rungs, at 2 and 4 of 6 steps. Of a chain of 20 steps, cosine alone ends in noise: its bound is the better."""
    assert sweep(storage, "stopping", STOPPING % "") == 0
    rows = {row["label"]: row for row in board(storage, "stopping")}
    good, bad = rows["cosine dropout=0.5"], rows["linear dropout=0.5"]
    assert (good["state"], good["rank"], bad["state"], bad["step"]) == ("finished", "1", "stopped", 2)
    _, children = parent_and_children(client, "stopping")
    stopped = children[bad["trial"]]
    assert stopped.info.status == "KILLED" and stopped.data.tags["sweep.reason"] == "stopped early at 2 steps"
    first = children[good["trial"]]
    assert [p.step for p in client.get_metric_history(first.info.run_id, "rung/nll_bpd")] == [2, 4]
    before = trained(storage)
    assert sweep(storage, "stopping", STOPPING % "") == 0
    assert trained(storage) == before and "2 done, 0 to do" in capsys.readouterr().out
    # A resumed study judges by what the last command saw: the first of all trials would go on whatever its bound.
    assert sweep(storage, "stopping", STOPPING % ", quad") == 0
    (added,) = (row for row in board(storage, "stopping") if "quad" in row["label"])
    assert (added["state"], added["step"]) == ("stopped", 2)


def test_what_a_killed_driver_left_is_put_right(grid, storage, client):
    """Its children say RUNNING, its states too, and one trial's scores never arrived and those of another are gone."""
    _, children = parent_and_children(client, "grid")
    state = read_json(grid / "state.json", dict)
    for key, child in children.items():
        state["trials"][key]["state"] = "running"
        client.update_run(child.info.run_id, status="RUNNING")
    write_json(grid / "state.json", state)
    for path in (grid / "tracking").glob("*.json"):
        mirror = read_json(path, dict)
        for server in mirror["servers"].values():
            server["parcels"].pop("status")
        write_json(path, mirror | {"status": "RUNNING"})
    found = (storage / board(storage, "grid")[2]["run"]).glob("evaluation/[0-9a-f]*/metrics.json")
    metrics = min(found, key=lambda path: path.stat().st_mtime_ns)  # later ones are of other studies
    kept, before = metrics.read_bytes(), trained(storage)
    metrics.unlink()
    assert sweep(storage, "grid", GRID) == 0
    assert metrics.read_bytes() == kept and trained(storage) == before
    assert {row["state"] for row in board(storage, "grid")} == {"finished"}
    _, again = parent_and_children(client, "grid")
    assert {child.info.status for child in again.values()} == {"FINISHED"}
    assert {run.info.run_id for run in again.values()} == {run.info.run_id for run in children.values()}
    assert {child.data.tags[tracking.STATE_TAG] for child in again.values()} == {"finished"}


def test_a_spent_budget_starts_nothing_more_and_says_so(grid, storage, client, capsys):
    assert sweep(storage, "spent", SPACE % ("[quad]", "[0.0, 0.2]"), "sweep.budget.hours=1e-9") == 0
    assert "budget.hours=1e-09 is spent, 2 trials are left" in capsys.readouterr().out
    assert {row["state"] for row in board(storage, "spent")} == {"new"}
    assert sweep(storage, "few", GRID, "sweep.budget.trials=3") == 0
    assert len(board(storage, "few")) == 3


def test_a_server_that_hangs_holds_no_trial_up_and_gets_it_later(storage, client, monkeypatch, capsys):
    took, end_trial = [], StudyRecorder.end_trial

    def measure(*arguments):
        began = time.monotonic()
        end_trial(*arguments)
        took.append(time.monotonic() - began)

    monkeypatch.setattr(StudyRecorder, "end_trial", measure)
    monkeypatch.setattr(recorder, "DEADLINE", 0.5)
    monkeypatch.setattr(tracking, "check_server", lambda uri: None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and never answers
        uri = f"cluster.tracking_uri=http://127.0.0.1:{server.getsockname()[1]}"
        assert sweep(storage, "hanging", ONE_KEY % ("model.dropout", "[0.37]"), uri) == 0
    assert len(took) == 1 and took[0] < 2, "each request hangs for three seconds"
    assert "the same command delivers" in capsys.readouterr().out
    monkeypatch.undo()
    assert sweep(storage, "hanging", ONE_KEY % ("model.dropout", "[0.37]")) == 0
    assert len(parent_and_children(client, "hanging")[1]) == 1


SCORES = {"is_mean": 2.0, "nll_bpd": 3.0, "rate_bpd": 2.0, "distortion_bpd": 1.0, "rmse": 1.0}
SEEDED = "experiment: digits\nspace: {model.dropout: [0.0, 0.2]}\nseeds: [0, 1]\n"


@pytest.fixture
def plain(monkeypatch, undrawn):
    monkeypatch.setattr(tracking, "ParentRun", Mock(return_value=Mock(run_id="", is_behind=False)))


def finished(storage: Path, dropout: float, seed: int, loss: float = 0.1, **scores: float) -> Trial:
    swept = {"model.dropout": dropout, "seed": seed}
    run = make_run(storage, "digits", tuple(f"{key}={value}" for key, value in swept.items()))
    write_scores(run.scores, run.experiment, scores=SCORES | scores)
    point = {"step": run.experiment.train.steps, "time": 1, "metrics": {"train/loss": loss}}
    with run.log.open("a") as log:
        log.write(json.dumps(point) + "\n")
    return Trial(run.run_key, f"dropout={dropout} seed={seed}", swept, run)


def publish(storage: Path, trials: list[Trial], *words: str):
    """The texts of the leaderboard and of the page, and the leaderboard itself."""
    file, folder = storage / "study.yaml", storage / "sweeps" / "study"
    file.write_text(SEEDED)
    sweep = load_sweep(str(file), list(words))
    states = TrialStates(folder, sweep.early_stop, [])
    states.records = {trial.key: TrialState(state="finished", reason="", rungs=[]) for trial in trials}
    recorder = StudyRecorder(sweep, {trial.key: trial for trial in trials}, states, folder, "", lambda: False)
    recorder.finish("FINISHED")
    texts = [(folder / name).read_text() for name in ("leaderboard.md", "report/report.md")]
    return *(text.replace("\u00a0", " ") for text in texts), recorder.leaderboard


def test_trials_within_their_errors_share_a_rank_in_every_output(tmp_path, capsys, plain):
    """Equal weights and other sampling seeds; a trial that is five errors worse; three training seeds."""
    scores = [(0.0, 0, 14.0), (0.1, 0, 14.6), *((0.2, seed, 21 + seed / 2) for seed in range(3))]
    trials = [finished(tmp_path, dropout, seed, fid=fid, fid_se=1.0) for dropout, seed, fid in scores]
    leaderboard, page, board = publish(tmp_path, trials)
    rows = ["1-2 | 0.0 | 0 | 14.0 ± 1.0 |", "1-2 | 0.1 | 0 | 14.6 ± 1.0 |", "3 | 0.2 | 0, 1, 2 | 21.50 ±"]
    assert all(f"| {row}" in leaderboard for row in rows) and "| +0.6 ± 1.4 |" in leaderboard
    assert re.findall(r"^\| (1-2|3)\. ", page, re.MULTILINE) == ["1-2", "1-2", "3"]
    assert "has the lowest FID of 3: 14.0 ± 1.0; 1 of the others cannot be told from it" in leaderboard
    assert main(["status", f"cluster.storage={tmp_path}"]) == 0
    assert "1-2." in capsys.readouterr().out
    found = [(row["rank"], row["FID"], row["FID ±"]) for row in make_rows(board)[::2]]
    assert found == [("1-2", 14, 1), ("3", 21.5, 0.5)]
    (heads,) = (line for line in format_text(board).splitlines() if "rank" in line)
    assert heads.split() == ["rank", "dropout", "seed", "FID", "IS", "NLL"], (
        "not what is the same in all rows"
    )


@pytest.mark.parametrize(("metric", "heading"), [("rmse", "RMSE"), ("train_loss", "training loss")])
def test_the_page_is_ranked_by_the_metric_of_the_sweep(tmp_path, plain, metric, heading):
    """By FID the order would be the other way round."""
    trials = []
    for dropout, fid, value in ((0.0, 1.0, 9.0), (0.2, 2.0, 8.0)):
        own = {"loss" if metric == "train_loss" else metric: value}
        trials.append(finished(tmp_path, dropout, 0, fid=fid, **own))
    leaderboard, page, _ = publish(tmp_path, trials, f"rank.metric={metric}")
    for text in (leaderboard, page):
        assert re.search(r"\*\*dropout=0\.2.* ha(?:s|ve) the (?:lowest|best) ", text), text
    assert f"ranked by {heading}" in page
    assert re.findall(r"^\| 1\. \[?(dropout=\S+)", page, re.MULTILINE) == ["dropout=0.2"]

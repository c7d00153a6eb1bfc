"""One order of trials, on the leaderboard of a sweep and on the page that the sweep writes."""

import json
import re
from pathlib import Path

import pytest
from synthetic_run import make_run, write_scores

from pipeline import tracking
from pipeline.cli.program import main
from pipeline.drawing import charts
from pipeline.sweep.definition import load_sweep
from pipeline.sweep.leaderboard import make_rows
from pipeline.sweep.points import Trial
from pipeline.sweep.recorder import StudyRecorder
from pipeline.sweep.trial_states import TrialState, TrialStates

SCORES = {"is_mean": 2.0, "nll_bpd": 3.0, "rate_bpd": 2.0, "distortion_bpd": 1.0, "rmse": 1.0}
SPACE = "experiment: digits\nspace: {model.dropout: [0.0, 0.2]}\nseeds: [0, 1]\n"


class Silence:
    """A tracking server that is not there."""

    run_id, is_behind = "", False

    def __init__(self, *_: object, **__: object):
        pass

    send_leaderboard = finish = __init__


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No server, and pictures that take no time."""
    monkeypatch.setattr(charts, "save_panels", lambda panels, file: file.write_text("<svg></svg>"))
    monkeypatch.setattr(tracking, "ParentRun", Silence)


def finished(storage: Path, dropout: float, seed: int, loss: float = 0.1, **scores: float) -> Trial:
    """A trial that has ended, with these scores and this last loss."""
    swept = {"model.dropout": dropout, "seed": seed}
    experiment, run = make_run(storage, "digits", tuple(f"{key}={value}" for key, value in swept.items()))
    folder = run.of(experiment).scores
    write_scores(folder, experiment, scores=SCORES | scores)
    point = {"step": experiment.train.steps, "time": 1, "metrics": {"train/loss": loss}}
    with run.log.open("a") as log:
        log.write(json.dumps(point) + "\n")
    return Trial(run.run_key, f"dropout={dropout} seed={seed}", swept, run)


def publish(storage: Path, trials: list[Trial], *words: str) -> tuple[str, str]:
    """leaderboard.md and the page of a sweep that has these trials, as people read them."""
    file, folder = storage / "study.yaml", storage / "sweeps" / "study"
    file.write_text(SPACE)
    sweep = load_sweep(str(file), list(words))
    states = TrialStates(folder, sweep.early_stop, [])
    states.records = {trial.key: TrialState(state="finished", reason="", rungs=[]) for trial in trials}
    recorder = StudyRecorder(sweep, {trial.key: trial for trial in trials}, states, folder, "", lambda: False)
    recorder.finish("FINISHED")
    texts = [(folder / name).read_text() for name in ("leaderboard.md", "report/report.md")]
    Silence.board = recorder.leaderboard
    return texts[0].replace("\u00a0", " "), texts[1].replace("\u00a0", " ")


def winner(text: str) -> str:
    """The label in the sentence that names it."""
    found = re.search(r"\*\*(dropout=0\.\d).* ha(?:s|ve) the (?:lowest|highest|best) ", text)
    assert found, text
    return found[1]


def test_trials_within_their_errors_share_a_rank_in_every_output(tmp_path, capsys):
    """Equal weights and other sampling seeds; a trial that is five errors worse; three training seeds."""
    scores = [(0.0, 0, 14.0), (0.1, 0, 14.6), *((0.2, seed, 21 + seed / 2) for seed in range(3))]
    trials = [finished(tmp_path, dropout, seed, fid=fid, fid_se=1.0) for dropout, seed, fid in scores]
    leaderboard, page = publish(tmp_path, trials)
    rows = ["1-2 | 0.0 | 0 | 14.0 ± 1.0 |", "1-2 | 0.1 | 0 | 14.6 ± 1.0 |", "3 | 0.2 | 0, 1, 2 | 21.50 ±"]
    assert all(f"| {row}" in leaderboard for row in rows) and "| +0.6 ± 1.4 |" in leaderboard
    assert re.findall(r"^\| (1-2|3)\. ", page, re.MULTILINE) == ["1-2", "1-2", "3"]
    assert "has the lowest FID of 3: 14.0 ± 1.0; 1 of the others cannot be told from it" in leaderboard
    assert main(["status", f"cluster.storage={tmp_path}"]) == 0
    assert "1-2." in capsys.readouterr().out
    found = [(row["rank"], row["FID"], row["FID ±"]) for row in make_rows(Silence.board)[::2]]
    assert found == [("1-2", 14, 1), ("3", 21.5, 0.5)]


HEADINGS = {"rmse": "RMSE", "rate_bpd": "rate", "distortion_bpd": "distortion", "train_loss": "training loss"}


@pytest.mark.parametrize("metric", HEADINGS)
def test_the_page_is_ranked_by_the_metric_of_the_sweep(tmp_path, metric):
    """By FID the order would be the other way round."""
    trials = []
    for dropout, fid, value in ((0.0, 1.0, 9.0), (0.2, 2.0, 8.0)):
        own = {"loss" if metric == "train_loss" else metric: value}
        trials.append(finished(tmp_path, dropout, 0, fid=fid, **own))
    leaderboard, page = publish(tmp_path, trials, f"rank.metric={metric}")
    assert winner(leaderboard) == winner(page) == "dropout=0.2"
    assert f"ranked by {HEADINGS[metric]}" in page
    assert re.findall(r"^\| 1\. \[?(dropout=\S+)", page, re.MULTILINE) == ["dropout=0.2"]

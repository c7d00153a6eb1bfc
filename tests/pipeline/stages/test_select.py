"""The best of several checkpoints: chosen by the scores that they have, made once, and told to whoever comes after."""

import io
import json
import logging
import shutil
from contextlib import redirect_stdout

import pytest
from conftest import ONE_CPU, TINY, blank_charts, one_cpu
from staged import asking_for, change, results, run_stage, scoring, with_weights

from pipeline.cli.program import main
from pipeline.engine.plan import list_rounds
from pipeline.errors import PipelineError
from pipeline.stages import evaluate, sample, select
from pipeline.store import selection
from pipeline.store.files import read_json

STEPS = (2, 4, 6)
UNITS = 2  # of twelve samples each


@pytest.fixture
def trained(tiny_run):
    tiny_run = change(tiny_run, "diffusion", timesteps=4)
    asked = {"metrics": ("fid",), "features": "projection", "checkpoints": "every:2", "checkpoint_images": 12}
    tiny_run = asking_for(scoring(tiny_run, **asked), checkpoint="best")
    for step, scale in zip(STEPS, (1.0, 0.01, 3.0), strict=True):
        save(tiny_run, step, scale)
    return tiny_run


def save(run, step, scale):
    with_weights(change(run, "train", steps=step), scale)


def is_done(run):
    """Whether the selection is there; the stage and the file that later stages read agree on it."""
    done = select.STAGE.is_done(run)
    assert done == (selection.fill_in_selection(run) is not None)
    return done


def fids(run):
    candidates = selection.list_candidates(run).items()
    return {step: results(place)["scores"]["fid"] for step, place in candidates}


def test_the_best_is_the_one_of_minimum_fid_and_later_stages_are_told(trained):
    """All candidates are sampled in one round; the reference's features are made once, whoever asks for them."""
    assert not is_done(trained)
    rounds = []
    for units in list_rounds(select.STAGE, trained):
        rounds.append([unit.name for unit in units])
        one_cpu().run_units(units, lambda unit: None)
    assert len(next(names for names in rounds if names)) == UNITS * len(STEPS)
    ran = [name for names in rounds for name in names if "train" in name]
    assert len(ran) == len(set(ran)) and is_done(trained)
    found, scores = selection.read_selection(trained), fids(trained)
    assert len(set(scores.values())) == len(STEPS)
    best = min(scores, key=scores.get)
    assert found["best"] == best
    assert [(score["step"], score["fid"]) for score in found["scores"]] == sorted(scores.items())
    assert (found["metric"], found["n"], found["weights"], found["reference"]) == ("fid", 12, "ema", "train")
    resolved = selection.fill_in_selection(trained)
    assert resolved.experiment.checkpoint_step == best
    plain = asking_for(trained, checkpoint=best)
    assert resolved.samples == plain.samples
    assert resolved.scores != plain.scores, "another protocol"
    assert len(run_stage(sample, resolved)) == UNITS, "the candidate's samples are not scored again"
    assert trained.replace_experiment(trained.experiment.make_candidate(best)).samples != plain.samples
    run_stage(evaluate, resolved)
    protocol = read_json(resolved.metrics_json, dict)["protocol"]
    assert protocol["checkpoint"] == best
    assert protocol["checkpoint_rule"] == "best of 3 checkpoints by FID on 12 other images, ema weights"


def test_what_was_done_is_not_done_again_and_new_checkpoints_join(trained, caplog):
    first = next(list_rounds(select.STAGE, trained))
    one_cpu().run_units(first[:4], lambda unit: None)  # then the command was killed
    names = run_stage(select, trained)
    assert sum(name.startswith("samples") for name in names) == UNITS * len(STEPS) - 4
    assert run_stage(select, trained) == []
    before, longer = fids(trained), change(trained, "train", steps=8)
    assert not select.STAGE.is_done(longer), "training has not come to its end"
    save(trained, 8, 0.02)
    assert not select.STAGE.is_done(longer)
    names, found = run_stage(select, longer), selection.read_selection(longer)
    assert sum(name.startswith("samples") for name in names) == UNITS
    assert [score["step"] for score in found["scores"]] == [*STEPS, 8]
    assert before.items() <= fids(longer).items()
    assert selection.fill_in_selection(longer).experiment.checkpoint_rule.startswith("best of 4 ")
    path = longer.selection_json
    path.write_text(path.read_text().replace('"best": ', '"best": 1'))
    assert not is_done(longer) and "selection.json" in caplog.text
    assert run_stage(select, longer) == [] and is_done(longer), "what is damaged is made again"


def test_an_interruption_leaves_no_candidate_and_a_lack_of_candidates_is_said(trained, caplog):
    save(trained, 5, 1.0)
    every = scoring(trained, checkpoints="all")
    ended = change(every, "train", steps=5)
    found = [list(selection.list_candidates(asked)) for asked in (trained, every, ended)]
    assert found == [[2, 4, 6], [2, 4, 6], [2, 4, 5]]
    shutil.rmtree(trained.locate_step(2))
    with caplog.at_level(logging.WARNING):
        next(list_rounds(select.STAGE, trained))
    assert "2 of 3 checkpoints are there" in caplog.text
    for step in (4, 6):
        shutil.rmtree(trained.locate_step(step))
    with pytest.raises(PipelineError, match=r"no checkpoint for .*checkpoints=every:2 \(there are: 5\)"):
        next(list_rounds(select.STAGE, trained))


WORDS = ["evaluate.metrics=[fid]", "evaluate.features=projection", "evaluate.checkpoints=every:2"]
WORDS += ["sample.checkpoint=best", "train.keep=1", "figures.which=[samples]"]


def ddpm(storage, *words, verb="run"):
    printed = io.StringIO()
    with redirect_stdout(printed), blank_charts():
        assert main([verb, "digits", *TINY, *WORDS, *ONE_CPU, f"cluster.storage={storage}", *words]) == 0
    return printed.getvalue()


def test_the_command_scores_the_best_and_status_and_mlflow_know_it(tmp_path, empty_store):
    """In MLflow stand the curve, the choice, and other weights as a child."""
    from mlflow.tracking import MlflowClient

    shutil.copy(empty_store, storage := tmp_path)
    ddpm(storage, verb="train")
    ddpm(storage, "sample.weights=raw", "sample.checkpoint=4", "evaluate.checkpoints=null", verb="evaluate")
    ddpm(storage)
    (path,) = storage.glob("tiny-*/selection/*/selection.json")
    run, found = path.parents[2], json.loads(path.read_text())
    on_curve = {score["evaluation"] for score in found["scores"]}
    files = [path for path in run.glob("evaluation/*/metrics.json") if path.parent.name not in on_curve]
    others = [json.loads(path.read_text())["protocol"] for path in files]
    scored = {(p["weights"], p["checkpoint"], p["n"]) for p in others}
    assert scored == {("ema", found["best"], 12), ("raw", 4, 12)}
    steps = sorted(int(path.name[5:]) for path in run.glob("train/step_*"))
    assert steps == [2, 4, 6], "train.keep=1, and yet"
    assert "everything up to date" in ddpm(storage)
    best = found["best"]
    assert f"checkpoint  {best}, best of 3 checkpoints" in ddpm(storage, verb="show")
    assert "not known before the best" in ddpm(storage, "evaluate.checkpoint_images=7", verb="show")
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["status", f"cluster.storage={storage}"]) == 0
    assert f"best step {best}:" in printed.getvalue()
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    (parent,) = (r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    (child,) = (r for r in runs if "mlflow.parentRunId" in r.data.tags)
    curve = {p.step: p.value for p in client.get_metric_history(parent.info.run_id, "selection/fid")}
    assert curve == {score["step"]: score["fid"] for score in found["scores"]}
    assert parent.data.metrics["selection/best_step"] == best
    assert parent.data.tags["protocol.checkpoint_rule"].startswith("best of 3 ")
    assert (parent.data.tags["protocol.weights"], child.data.tags["weights"]) == ("ema", "raw")
    (metrics,) = run.glob(f"evaluation/{child.data.tags['evaluation_key']}/metrics.json")
    assert child.data.metrics["fid"] == json.loads(metrics.read_text())["scores"]["fid"]
    assert child.data.metrics["fid"] != parent.data.metrics["fid"]

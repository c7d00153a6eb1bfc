"""Sweep files, their points, what is wrong with them, and how many trials run at once."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import GRID, TRIAL
from ray.exceptions import RayError

from pipeline import config
from pipeline.cli.program import main
from pipeline.config import load_cluster
from pipeline.engine import execute
from pipeline.errors import ConfigError
from pipeline.sweep import reproduction, study, trial_tasks
from pipeline.sweep.definition import load_sweep
from pipeline.sweep.points import list_points
from pipeline.sweep.shares import divide_cluster
from pipeline.sweep.trial import PartResult

DRAWN = "experiment: digits\nspace:\n  %s\ndraw: {method: sobol, points: 2}\n"


def sweep_file(folder: Path, text: str = GRID, name: str = "study") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


def faults(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        list_points(load_sweep(sweep_file(folder, text), list(overrides)), TRIAL)
    return error.value.problems


def test_a_grid_is_every_combination_in_the_order_of_the_file(tmp_path):
    found = list_points(load_sweep(sweep_file(tmp_path, GRID + "seeds: [0, 1]\n"), []), TRIAL)
    assert len(found) == 8
    assert found[1].label == "linear dropout=0.0 seed=1"
    assert found[-1].swept == {"diffusion.beta_schedule": "cosine", "model.dropout": 0.2, "seed": 1}
    last = found[-1].experiment
    assert (last.diffusion.beta_schedule, last.model.dropout, last.seed) == ("cosine", 0.2, 1)
    assert last.train.steps == 6  # what the command line says is for all


@pytest.mark.parametrize("method", ["random", "sobol"])
def test_drawn_points_lie_in_the_space_and_more_of_them_begin_with_the_same(tmp_path, method):
    text = """
experiment: digits
space:
  train.lr: {low: 1.0e-4, high: 1.0e-2, scale: log}
  model.dropout: {low: 0.0, high: 0.5}
  sample.batch_size: {low: 1, high: 5}
draw: {method: %s, points: 8, seed: 3}
rank: {metric: nll_bpd}
overrides: {train.steps: 3000}
"""
    path = sweep_file(tmp_path, text % method)
    few, many = list_points(load_sweep(path, ["draw.points=4"]), []), list_points(load_sweep(path, []), [])
    assert [point.swept for point in few] == [point.swept for point in many[:4]]
    rates = sorted(point.experiment.train.lr for point in many)
    assert 1e-4 <= rates[0] < 1e-3 < rates[-1] <= 1e-2
    if method == "sobol":
        eighths = [int(16 * point.swept["model.dropout"]) for point in many]
        assert sorted(eighths) == list(range(8)), "each eighth of an axis has one"
    assert {type(point.swept["sample.batch_size"]) for point in many} == {int}
    assert {point.swept["sample.batch_size"] for point in many} == {1, 2, 3, 4, 5}
    other = list_points(load_sweep(path, ["draw.seed=4"]), [])
    assert [point.swept for point in other] != [point.swept for point in many]
    again = load_sweep(sweep_file(tmp_path, config.to_yaml(load_sweep(path, [])), "sweep"), [])
    assert again == load_sweep(path, []), "what a study writes down can be run again"


def test_every_shipped_sweep_loads_and_has_its_trials_and_named_experiments_are_points_of_their_own():
    sizes = {}
    for path in sorted((Path(__file__).parents[3] / "conf" / "sweep").glob("*.yaml")):
        sweep = load_sweep(path.stem, [])
        sizes[path.stem] = len({json.dumps(point.swept) for point in list_points(sweep, [])})
        assert sizes[path.stem] == sweep.count
    assert sizes == {
        "beta_dropout": 16, "beta_dropout_short": 16, "cifar10_tiny": 16, "digits_beta_dropout": 8, "ladder": 18,
        "samplers": 32, "short_runs": 7, "table2": 6,
    }  # fmt: skip
    second = list_points(load_sweep("table2", []), [])[1]
    assert second.label == second.experiment.name == second.swept["experiment"] == "cifar10_vlb_eps_fixed"


def test_one_at_a_time_keeps_the_first_values_of_the_other_keys(tmp_path):
    text = "experiment: digits\nspace:\n  model.dropout: [0.1, 0.2, 0.3]\n  train.lr: [0.001, 0.002]\n"
    text += "draw: {method: one_at_a_time}\nrank: {metric: train_loss}\n"
    sweep = load_sweep(sweep_file(tmp_path, text), [])
    swept = [tuple(point.swept.values()) for point in list_points(sweep, TRIAL)]
    assert swept == [(0.1, 0.001), (0.2, 0.001), (0.3, 0.001), (0.1, 0.002)] and sweep.count == 4


@pytest.mark.parametrize(("text", "message"), [
    ("experiment: digits\nspace:\n  diffusion.beta_shedule: [linear]\n", "beta_schedule"),
    ("experiment: digits\n", "space is empty"),
    ("experiment: digits\nspace:\n  model.dropout: [0.1, 0.1]\n", "each value may stand there once"),
    (GRID + "overrides: {model.dropout: 0.3}\n", "space.model.dropout is overridden too"),
    (GRID + "draw: {method: grid, points: 4}\n", "draw.points is for random and sobol"),
    (GRID + "draw: {method: sobol}\n", "draw.points is null"),
    (GRID.replace("nll_bpd", "ndl_bpd"), "did you mean 'nll_bpd'?"),
    (GRID.replace("nll_bpd", "fid"), "rank.metric=fid is reported by no trial: evaluate.metrics is [nll]"),
    (GRID.replace("nll_bpd", "train_loss"), "not comparable over diffusion.beta_schedule"),
    (GRID + "early_stop: {first: 6}\n", "early_stop.first=6 is not below train.steps"),
    (GRID + "early_stop: {first: 2}\noverrides: {train.lr_decay: linear}\n", "lr_decay=none"),
    (GRID.replace("experiment: digits", ""), "one of the two is needed"),
    (GRID + "seeds: [0, 0]\n", "seeds is [0, 0]"),
    ("experiment: digits\nspace:\n  seed: [0, 1]\n", "space.seed cannot be swept"),
    (DRAWN % "model.dropout: {low: 0.5, high: 0.1}", "low=0.5 is not below high=0.1"),
    ("experiment: digits\nspace:\n  model.dropout: {low: 0.1, high: 0.5}\n", "which grid cannot have"),
    (DRAWN % "train.lr: {low: 0.0, high: 0.5, scale: log}", "a log scale begins above 0"),
    (DRAWN % "train.steps: [4, 6]" + "early_stop: {first: 2}\n", "train.steps is swept, and early_stop"),
])  # fmt: skip
def test_bad_sweeps_are_refused_by_name(tmp_path, text, message):
    found = faults(tmp_path, text)
    assert any(message in line for line in found), found
    assert all("\n" not in line for line in found)


def test_all_faults_of_a_file_are_reported_at_once_and_each_once(tmp_path):
    found = faults(tmp_path, GRID + "concurrent: 0\nbudget: {hours: -1}\ndraw: {method: gird}\n")
    assert len(found) == 3 and "did you mean 'grid'?" in " ".join(found)
    assert "concurrent is 0" in " ".join(found) and "budget.hours is -1" in " ".join(found)
    found = faults(tmp_path, GRID.replace("[0.0, 0.2]", "[0.0, 1.5]"))
    assert len(found) == 1, "two of the four points say it"


def test_ten_thousand_trials_ask_first(tmp_path, capsys):
    """They are counted, not built."""
    space = "".join(f"  {key}: {list(range(1, 11))}\n" for key in ("seed_", "b", "c", "d"))
    path, began = sweep_file(tmp_path, "experiment: digits\nspace:\n" + space), time.monotonic()
    assert main(["sweep", path, f"cluster.storage={tmp_path}"]) == 2
    assert time.monotonic() - began < 5
    assert "10,000 trials; if that is meant, say --yes" in capsys.readouterr().err


def cluster(**overrides):
    return load_cluster("local", [f"{key}={value}" for key, value in overrides.items()])


@pytest.mark.parametrize(("asked", "nodes", "trials", "concurrent", "expected"), [
    ({}, [(2, 0)], 8, None, (2, 1, 1, 0)),
    ({}, [(2, 0)], 1, None, (1, 1, 2, 0)),
    ({}, [(16, 0)], 8, 2, (2, 1, 8, 0)),
    ({"workers": 2}, [(2, 0)], 8, None, (1, 2, 1, 0)),
    ({"cpus_per_worker": 2}, [(3, 0), (3, 0)], 8, None, (2, 1, 2, 0)),  # not 6 // 2
    ({}, [(16, 4)], 8, None, (4, 1, 4, 1)),
    ({"gpus_per_worker": 0.5}, [(16, 1)], 8, None, (2, 1, 8, 0.5)),
    ({"workers": 8}, [(16, 4), (16, 4)], 8, None, (1, 8, 4, 1)),  # a trial over two machines
    ({"gpus_per_worker": 2}, [(8, 3), (8, 3)], 8, None, (2, 1, 5, 2)),  # no worker over two machines
])  # fmt: skip
def test_no_more_trials_than_there_is_room_for(asked, nodes, trials, concurrent, expected):
    """expected: trials at once; workers of each, and the CPUs and GPUs of a worker."""
    found = divide_cluster(cluster(**asked), nodes, trials, concurrent)
    one = found.resources
    assert (found.slots, one.workers, one.cpus_per_worker, one.gpus_per_worker) == expected


def replace_ray(monkeypatch, nodes: list, start: Callable, wait: Callable, get: Callable) -> None:
    """Let `run_trials` start, await and read its tasks by these functions."""
    parts = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))
    monkeypatch.setattr(trial_tasks.ray, "remote", lambda body: parts)
    monkeypatch.setattr(trial_tasks.ray, "nodes", lambda: [{"Alive": True, "Resources": {}}])
    monkeypatch.setattr(trial_tasks.ray, "wait", wait)
    monkeypatch.setattr(trial_tasks.ray, "get", get)
    monkeypatch.setattr(trial_tasks, "release_training_group", lambda place: None)
    monkeypatch.setattr(trial_tasks.RaySession, "list_nodes", lambda: nodes)


def test_machines_that_join_or_leave_change_how_many_trials_start(monkeypatch):
    """The first trial that runs ends at each wait; a machine joins at the first one, and leaves at the second."""
    nodes, began, running = [(2, 0)], [], []
    share = divide_cluster(cluster(), nodes, 5, None)

    def wait(calls: list, timeout: float) -> tuple[list, list]:
        running.append(len(calls))
        if len(running) < 3:
            (nodes.append if len(running) == 1 else nodes.remove)((1, 0))
        return calls[:1], calls[1:]

    replace_ray(monkeypatch, nodes, lambda *_: object(), wait, lambda call: PartResult())
    recorder = SimpleNamespace(
        may_start_trial=lambda: True, start_trial=began.append, end_part=lambda *_: False
    )
    tasks = {key: SimpleNamespace(parts=[None], place=None) for key in "abcde"}
    trial_tasks.run_trials(tasks, share, recorder, lambda: None)
    assert running == [2, 3, 2, 2, 1]
    assert "".join(began) == "abcde"


def test_each_part_of_a_trial_is_a_task_and_a_lost_process_ends_its_trial(monkeypatch):
    """Trial a goes through its rung to the end, b is stopped there, and c loses its process."""
    ran, ended = [], []

    def start(task: SimpleNamespace, steps: int | None, share: object) -> tuple[str, int | None]:
        ran.append((task.place, steps))
        return ran[-1]

    def get(call: tuple[str, int | None]) -> PartResult:
        if call[0] == "c":
            raise RayError
        return PartResult(bound=call[1] and 4.0)

    def end_part(key: str, steps: int | None, result: PartResult) -> bool:
        goes_on = result.bound is not None and key == "a"
        if not goes_on:
            ended.append((key, steps, result.error))
        return goes_on

    replace_ray(monkeypatch, [(1, 0)], start, lambda calls, timeout: (calls[:1], calls[1:]), get)
    recorder = SimpleNamespace(may_start_trial=lambda: True, start_trial=lambda key: None, end_part=end_part)
    tasks = {key: SimpleNamespace(parts=[2, None], place=key) for key in "abc"}
    trial_tasks.run_trials(tasks, divide_cluster(cluster(), [(1, 0)], 3, None), recorder, lambda: None)
    assert ran == [("a", 2), ("a", None), ("b", 2), ("c", 2)]
    lost = "its process was lost; Ray's logs in /tmp/ray say more"
    assert ended == [("a", None, None), ("b", 2, None), ("c", 2, lost)]


def test_a_budget_scales_steps_samples_and_bounds_by_one_share():
    known = {"2000": (2000, None), "2h": (None, 2.0), "30min": (None, 0.5), "full": (None, None)}
    assert {text: reproduction.parse_budget(text) for text in known} == known
    for text in ("", "0", "two hours", "1.5", "-3", "2d", "1" + "0" * 400 + "h", "nanh"):
        with pytest.raises(ConfigError, match=r"a number of steps \(2000\), a time \(2h, 30min\), or full"):
            reproduction.parse_budget(text)
    full = config.load_experiment("cifar10", [])
    words, note = reproduction.scale_experiment(8000, full)
    short = config.load_experiment("cifar10", words)
    assert (short.train.steps, short.sample.num_images, short.evaluate.nll_images) == (8000, 500, 100)
    assert short.train.ema_warmup and short.train.warmup_steps == 400
    assert reproduction.count_passes(short) == pytest.approx(reproduction.count_passes(full) / 100)
    assert reproduction.scale_experiment(800_000, full)[0] == [] and "1 % of the paper's length" in note
    longer = config.load_experiment("cifar10", reproduction.scale_experiment(20_000, full)[0])
    assert not longer.train.ema_warmup


def test_the_rate_is_measured_once_by_its_best_window(tmp_path, monkeypatch):
    """Five rows share five hours; at one full row in ten hours, each gets a tenth of its 800,000 steps."""
    row = config.load_experiment("cifar10", [])
    rates = (1.0, reproduction.count_passes(row) / 3 / 36_000)
    points = [{"step": 1, "time": 0, "metrics": {"train/images_per_second": rate}} for rate in rates]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(point)}\n" for point in points))
    points = [SimpleNamespace(experiment=row)] * 5
    monkeypatch.setattr(reproduction, "list_points", lambda sweep, words: seen.append(words) or points)
    monkeypatch.setattr(study, "Study", lambda *_: None)
    monkeypatch.setattr(execute, "run_stages", lambda *_: SimpleNamespace(log=tmp_path / "log.jsonl"))
    there = cluster(storage=tmp_path)
    for _ in range(2):
        seen: list[list[str]] = []
        reproduction.plan_reproduction("cifar10", "5h", [], there, dry_run=False)
        assert any(word.startswith(("train.steps=80000", "train.steps=79999")) for word in seen[-1])
        monkeypatch.delattr(execute, "run_stages", raising=False)  # the second time nothing is measured

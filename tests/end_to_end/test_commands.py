"""The program as a person runs it: a process of its own, real files, real MLflow, real kills; no Ray."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from conftest import ONE_CPU, TINY, wait_until

from pipeline.cli.program import COMMANDS, main, parse_arguments
from pipeline.engine.find import find_named_runs, find_run
from pipeline.errors import PipelineError
from pipeline.store import checkpoint

SCORED = "evaluate.metrics=[fid,is,nll]"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def arguments(storage: Path, *words: str, verb: str = "run") -> list[str]:
    return [verb, "digits", *TINY, *ONE_CPU, f"cluster.storage={storage}", *words]


def ddpm(storage: Path, *words: str, verb: str = "run") -> str:
    """Run a command to its end in this process, which has its imports behind it; returns what it printed."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(arguments(storage, *words, verb=verb)) == 0
    return printed.getvalue()


def process(storage: Path, *words: str, verb: str = "run") -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline", *arguments(storage, *words, verb=verb)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def python(code: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=ENVIRONMENT | variables, capture_output=True, text=True)


def run_directory(storage: Path) -> Path:
    (found,) = (path.parent for path in storage.glob("tiny-*/experiment.yaml"))
    return found


def final_state(storage: Path, step: int) -> dict:
    return checkpoint.load_checkpoint(run_directory(storage) / "train" / f"step_{step:08d}")


def mlflow_run(storage: Path, store: str = "mlflow.db") -> tuple[Any, Any]:
    """(client, run)"""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/{store}")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    (run,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    return client, run


def mlflow_points(storage: Path, store: str = "mlflow.db") -> list[tuple[int, int, float]]:
    client, run = mlflow_run(storage, store)
    history = client.get_metric_history(run.info.run_id, "loss/train")
    return sorted((point.step, point.timestamp, point.value) for point in history)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A storage root in which the tiny experiment was run to its end."""
    storage = tmp_path_factory.mktemp("finished")
    assert "report.html" in ddpm(storage, SCORED)
    return storage


def test_a_finished_run_has_its_artefacts_and_its_scores_have_their_protocol(finished):
    run = run_directory(finished)
    for pattern in (
        "experiment.yaml", "log.jsonl", "timings.json", "train/step_00000006/meta.json", "samples/*/manifest.json",
        "samples/*/00000.tar", "samples/*/grid.png", "evaluation/*/metrics.json", "evaluation/*/nll.json",
        "figures/*/manifest.json", "report/report.html", "report/report.md", "../data/digits-*/train-00000.tar",
    ):  # fmt: skip
        assert list(run.glob(pattern)), pattern
    assert not [path for path in finished.rglob(".tmp-*")]
    (path,) = run.glob("evaluation/*/metrics.json")
    metrics = json.loads(path.read_text())
    assert {"fid", "is_mean", "is_std", "nll_bpd", "rate_bpd", "distortion_bpd"} <= metrics["scores"].keys()
    assert metrics["protocol"]["comparable"] is False and metrics["protocol"]["n"] == 12
    spent = json.loads((run / "spent.json").read_text())
    assert {spent[kind]["20"]["images"] for kind in ("samples", "nll")} == {12, 6}
    assert all(0 < spent[kind]["20"]["seconds"] < 60 for kind in ("samples", "nll"))


def test_the_same_command_again_does_nothing_and_starts_no_ray(finished):
    code = (
        "import sys; from pipeline.cli.program import main; code = main(sys.argv[1:]); "
        "assert 'ray' not in sys.modules, 'Ray was imported'; sys.exit(code)"
    )
    outcome = python(code, *arguments(finished, SCORED))
    assert outcome.returncode == 0, outcome.stderr
    assert "everything up to date" in outcome.stdout
    page = run_directory(finished) / "report" / "report.html"
    for words in (
        "After 6 training steps: FID",
        page.as_uri(),
        "http://127.0.0.1:5000/#/experiments/1/runs?",
    ):
        assert words in outcome.stdout


def test_status_and_show_read_the_run(finished, capsys):
    assert main(["status", f"cluster.storage={finished}"]) == 0
    assert "6/6" in capsys.readouterr().out
    assert main(["show", "digits", *TINY, f"cluster.storage={finished}"]) == 0
    shown = capsys.readouterr().out
    assert run_directory(finished).name in shown and "warning: x_T keeps" in shown


def test_a_run_whose_extractor_weights_were_moved_is_still_shown(finished, tmp_path, capsys):
    run = tmp_path / run_directory(finished).name
    shutil.copytree(run_directory(finished), run)
    tree = (run / "experiment.yaml").read_text()
    text = tree.replace("extractor_weights: null", "extractor_weights: /moved/away.pth")
    assert text != tree
    (run / "experiment.yaml").write_text(text)
    assert main(["status", f"cluster.storage={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "6/6" in shown and "FID" in shown and "/moved/away.pth" in shown
    report = ["report", str(run / "experiment.yaml"), f"cluster.storage={tmp_path}"]
    for words in (["sync", str(run)], report):
        assert main(words) == 2
        assert "'/moved/away.pth' is not a file" in capsys.readouterr().err


def test_every_point_is_in_mlflow_once(finished):
    log = [json.loads(line) for line in (run_directory(finished) / "log.jsonl").read_text().splitlines()]
    expected = [(point["step"], point["time"], point["metrics"]["train/loss"]) for point in log]
    assert mlflow_points(finished) == expected


def test_an_up_to_date_command_delivers_what_a_server_has_not_got(finished, tmp_path):
    uri = f"sqlite:///{tmp_path}/other.db"
    for _ in range(2):
        said = ddpm(finished, SCORED, f"cluster.tracking_uri={uri}")
        assert "everything up to date" in said and "ddpm sync" not in said
        assert mlflow_points(tmp_path, store="other.db") == mlflow_points(finished)


def wait_for_checkpoint(process: subprocess.Popen, storage: Path) -> None:
    wait_until(lambda: list(storage.glob("tiny-*/train/step_*")), running=process)


LONGER = ("train.steps=200", "train.checkpoint_every=10", "model.dropout=0.2", "figures.which=[samples]")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Path:
    storage = tmp_path_factory.mktemp("untouched")
    ddpm(storage, *LONGER, verb="train")
    return storage


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130)])
def test_a_stopped_command_is_finished_by_the_same_command(tmp_path, untouched, number, code):
    first = process(tmp_path, *LONGER, verb="train")
    wait_for_checkpoint(first, tmp_path)
    first.send_signal(number)
    first.communicate(timeout=60)
    assert first.returncode == code
    assert not (run_directory(tmp_path) / "train" / "step_00000200").exists(), "stopped too late"
    ddpm(tmp_path, *LONGER, verb="train")
    ours, theirs = final_state(tmp_path, 200), final_state(untouched, 200)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [step for step, _, _ in mlflow_points(tmp_path)] == list(range(1, 201))


def test_two_equal_commands_never_work_at_once(tmp_path, capsys):
    """The second leaves with the number of the first; when that is killed, the lock is free."""
    endless = ["train.steps=1000000", "train.keep=1"]
    with process(tmp_path, *endless, verb="train") as first:
        try:
            wait_for_checkpoint(first, tmp_path)
            assert main(arguments(tmp_path, *endless, verb="train")) == 1
            told = capsys.readouterr().err
            assert f"being worked on by another command (process {first.pid} of " in told
            assert told.count("\n") == 1 and first.poll() is None
        finally:
            first.kill()
    reached = json.loads((run_directory(tmp_path) / "log.jsonl").read_text().splitlines()[-2])["step"]
    ddpm(tmp_path, f"train.steps={reached}", "train.keep=1", verb="train")


# A clock that jumps by up to a year whenever it is read, but for the one that only goes forward.
JUMPING = """
import random, sys, time
real, real_ns, draw = time.time, time.time_ns, random.Random(0)
jump = lambda: draw.randrange(-31_536_000, 31_536_000)
time.time, time.time_ns = lambda: real() + jump(), lambda: real_ns() + jump() * 10**9
from pipeline.cli.program import main
sys.exit(main(sys.argv[1:]))
"""


def test_each_stage_notes_the_commits_that_worked_on_it(tmp_path, monkeypatch):
    commands = [("a1", "train", "train.steps=4"), ("b2", "train", "seed=0")]
    for commit, verb, word in [*commands, ("c3", "evaluate", "evaluate.metrics=[nll]")]:
        monkeypatch.setattr("pipeline.engine.execute.find_commit", lambda commit=commit: commit)
        ddpm(tmp_path, word, verb=verb)
    noted = json.loads((run_directory(tmp_path) / "commits.json").read_text())
    assert noted == {"shard": ["a1"], "train": ["a1", "b2"], "evaluate": ["c3"]}
    assert "a1, b2" in mlflow_run(tmp_path)[1].data.tags["commit"]


@pytest.mark.slow
def test_nothing_depends_on_the_clock_but_the_times_that_are_noted(tmp_path, finished):
    """Trained half-way under one clock that jumps, and taken up under another."""
    for verb, words in (("train", ["train.steps=4"]), ("run", [SCORED])):
        command = [sys.executable, "-c", JUMPING, *arguments(tmp_path, *words, verb=verb)]
        outcome = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    ours, theirs = run_directory(tmp_path), run_directory(finished)
    for pattern in ("train/step_00000006/*", "samples/*/*.tar", "evaluation/*/metrics.json"):
        made, expected = ({str(file.relative_to(run)): file.read_bytes() for file in run.glob(pattern)}
                          for run in (ours, theirs))  # fmt: skip
        assert made == expected != {}, pattern
    points, expected = (mlflow_points(storage) for storage in (tmp_path, finished))
    assert [(step, value) for step, _, value in points] == [(step, value) for step, _, value in expected]
    noted = [time for _, time, _ in points]
    assert noted != sorted(noted), "the clock did not jump"
    assert all(0 < seconds < 600 for seconds in json.loads((ours / "timings.json").read_text()).values())


def test_the_beginning_of_a_name_means_a_run_where_it_is_the_only_one(tmp_path):
    for name in ("a-1", "a-2", "b-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.yaml").write_text("name: x\n")
    assert find_run("b", tmp_path) == find_run(str(tmp_path / "b-1"), Path()) == tmp_path / "b-1"
    assert len(find_named_runs("a", tmp_path)) == 2
    with pytest.raises(PipelineError, match="a-1, a-2"):
        find_run("a", tmp_path)
    with pytest.raises(PipelineError, match=r"no run directory; runs in .*: a-1, a-2, b-1"):
        find_run("c", tmp_path)


# Bad input: a line or two, exit code 1 or 2, no traceback


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "digts"], 2, "did you mean 'digits'?"),
        (["run", "digits", "model.dropuot=1"], 2, "did you mean 'dropout'?"),
        (["run", "digits", "cifar10"], 2, "one experiment at a time"),
        (["run", "digits", "cluster.wokers=2"], 2, "cluster.wokers is unknown (did you mean 'workers'?)"),
        (["run", "digits", "evaluate.extractor_weights=/n.pth", "cluster.storage={tmp}"], 2, "'/n.pth' is not a file"),
        (["run", "digits", "--cluster", "nowhere"], 2, "no cluster is named 'nowhere'"),
        (["run", "digits", "cluster.storage=/dev/null/runs"], 1, "cannot be written"),
        (["run", "cifar10", "data.path=/nowhere", "cluster.storage={tmp}"], 1, "/nowhere"),
        (["sync", "nowhere", "cluster.storage={tmp}"], 1, "no run directory"),
        (["train", *("digits", *TINY), "cluster.workers=0", "cluster.storage={tmp}", "cluster.tracking_uri=http://127.0.0.1:9"],
         1, "http://127.0.0.1:9"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_clear_error(tmp_path, capsys, words, code, message):
    assert main([word.replace("{tmp}", str(tmp_path)) for word in words]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 2


@pytest.mark.parametrize(
    "words",
    [["run", "--help"], ["run", "digits", "model.dropuot=1"], ["reproduce", "cifar10", "train.lr=fast"]],
)
def test_help_and_wrong_configurations_import_nothing_heavy(words):
    code = (
        "import sys; from pipeline.cli.program import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "assert not {'torch', 'ray', 'mlflow', 'matplotlib'} & set(sys.modules), 'imported'; sys.exit(code)"
    )
    outcome = python(code, *words)
    assert outcome.returncode == (0 if "--help" in words else 2), outcome.stderr
    assert "imported" not in outcome.stderr


def test_every_command_has_help_and_examples_of_its_own():
    assert len({command.examples for command in COMMANDS}) == len(COMMANDS)
    for command in COMMANDS:
        assert f"ddpm {command.name}" in command.examples


def test_options_stand_anywhere_among_words():
    options = parse_arguments(["run", "--cluster", "slurm", "digits", "--debug", "train.steps=3"])
    assert (options.words, options.cluster, options.debug) == (["digits", "train.steps=3"], "slurm", True)
    options = parse_arguments(["reproduce", "--budget", "2h", "cifar10", "--dry-run", "data.path=x"])
    assert (options.target, options.words, options.budget) == ("cifar10", ["data.path=x"], "2h")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ddpm run dig", {"digits"}),
        (
            "ddpm run digits train.precision=",
            {f"train.precision={name}" for name in ("fp32", "tf32", "bf16")},
        ),
        ("ddpm run --cluster kuberay digits --debug train.ema_w", {"train.ema_warmup="}),
        ("ddpm sweep digits_b", {"digits_beta_dropout"}),
        ("ddpm status cluster.stor", {"cluster.storage="}),
        ("ddpm submit --follow -- sample context_d", {"context_digits"}),
    ],
)
def test_the_shell_completes(tmp_path, line, expected):
    found = tmp_path / "completions"
    outcome = python(
        "from pipeline.cli.program import main; main()",
        _ARGCOMPLETE="1", COMP_LINE=line, COMP_POINT=str(len(line)), COMP_TYPE="9", _ARGCOMPLETE_IFS="\n",
        _ARGCOMPLETE_STDOUT_FILENAME=str(found), _ARGCOMPLETE_COMP_WORDBREAKS=" ",
    )  # fmt: skip
    assert {word.strip() for word in found.read_text().splitlines()} == expected, outcome.stderr

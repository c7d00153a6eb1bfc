"""The program as a person runs it: a process of its own, real files, real MLflow, real kills; no Ray."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from conftest import ONE_CPU, TINY, blank_charts, wait_until
from mlflow import MlflowClient

from pipeline.cli.program import COMMANDS, main, parse_arguments
from pipeline.store import checkpoint

FIGURES = "figures.which=[samples,rate_distortion]"
SCORED = ("evaluate.metrics=[fid,nll]", "evaluate.features=projection", FIGURES)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def arguments(storage: Path, *words: str, verb: str = "run") -> list[str]:
    return [verb, "digits", *TINY, *ONE_CPU, f"cluster.storage={storage}", *words]


def ddpm(storage: Path, *words: str, verb: str = "run") -> str:
    printed = io.StringIO()
    with redirect_stdout(printed), blank_charts():
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


def mlflow_points(storage: Path) -> list[tuple[int, int, float]]:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    (run,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    history = client.get_metric_history(run.info.run_id, "loss/train")
    return sorted((point.step, point.timestamp, point.value) for point in history)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    storage = tmp_path_factory.mktemp("finished")
    assert "report.html" in ddpm(storage, *SCORED)
    return storage


@pytest.fixture
def storage(tmp_path, empty_store) -> Path:
    shutil.copy(empty_store, tmp_path)
    return tmp_path


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
    assert {"fid", "nll_bpd", "rate_bpd", "distortion_bpd"} <= metrics["scores"].keys()
    assert metrics["protocol"]["comparable"] is False and metrics["protocol"]["n"] == 12
    spent = json.loads((run / "spent.json").read_text())
    assert {spent[kind]["20"]["images"] for kind in ("samples", "nll")} == {12, 6}
    assert all(0 < spent[kind]["20"]["seconds"] < 60 for kind in ("samples", "nll"))


def test_a_run_is_shown_even_when_its_extractor_weights_were_moved(finished, tmp_path, capsys):
    assert main(["show", "digits", *TINY, f"cluster.storage={finished}"]) == 0
    shown = capsys.readouterr().out
    assert run_directory(finished).name in shown and "warning: x_T keeps" in shown
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


def test_every_point_is_in_mlflow_once_and_another_server_gets_them_too(finished, tmp_path):
    log = [json.loads(line) for line in (run_directory(finished) / "log.jsonl").read_text().splitlines()]
    expected = [(point["step"], point["time"], point["metrics"]["train/loss"]) for point in log]
    assert mlflow_points(finished) == expected
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):
        said = ddpm(finished, *SCORED, f"cluster.tracking_uri={uri}")
        assert "everything up to date" in said and "ddpm sync" not in said
        assert mlflow_points(tmp_path) == expected


LONGER = ("train.steps=80", "train.checkpoint_every=5", "model.dropout=0.2")


def test_a_stopped_command_is_finished_by_the_same_command(storage, empty_store, capsys):
    """After a kill, and after a request to end. A second one meanwhile leaves with the number of the first."""
    newest = lambda: max([int(path.name[5:]) for path in storage.glob("tiny-*/train/step_*")], default=0)  # noqa: E731
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 130)):
        before, running = newest(), process(storage, *LONGER, verb="train")
        wait_until(lambda before=before: newest() > before, running=running)
        if number == signal.SIGKILL:
            running.send_signal(signal.SIGSTOP)
            assert main(arguments(storage, *LONGER, verb="train")) == 1
            told = capsys.readouterr().err
            assert f"worked on by another command (process {running.pid} of " in told
            assert told.count("\n") == 1
        running.send_signal(number)
        running.communicate(timeout=60)
        assert running.returncode == code and newest() < 80, "stopped too late"
    ddpm(storage, *LONGER, verb="train")
    (untouched := storage / "untouched").mkdir()
    shutil.copy(empty_store, untouched)
    ddpm(untouched, *LONGER, verb="train")
    ours, theirs = final_state(storage, 80), final_state(untouched, 80)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [step for step, _, _ in mlflow_points(storage)] == list(range(1, 81))


def test_help_status_show_and_mistakes_import_nothing_heavy_and_the_same_command_again_no_ray(finished):
    code = """
import sys
from pipeline.cli.program import main
*lines, again = sys.argv[1:]
for line in lines:
    try:
        print(main(line.split()))
    except SystemExit as end:
        print(end.code)
assert not {'torch', 'ray', 'mlflow', 'matplotlib', 'sklearn'} & sys.modules.keys()
print(main(again.split()))
assert not {'ray', 'torch_fidelity'} & sys.modules.keys()
"""
    lines = ["run --help", "run digits model.dropuot=1", "reproduce cifar10 train.lr=fast"]
    lines.append(f"status cluster.storage={finished}")
    lines.append(f"show digits cluster.storage={finished}/new")  # where no fingerprint is known
    outcome = python(code, *lines, " ".join(arguments(finished, *SCORED)))
    assert outcome.returncode == 0, outcome.stderr
    assert re.findall(r"^\d$", outcome.stdout, re.MULTILINE) == ["0", "2", "2", "0", "0", "0"]
    page = (run_directory(finished) / "report" / "report.html").as_uri()
    study = "http://127.0.0.1:5000/#/experiments/1/runs?"
    for words in ("everything up to date", "After 6 training steps: FID", page, study):
        assert words in outcome.stdout


def test_options_stand_anywhere_among_words_and_those_of_a_job_after_the_dashes():
    assert all(f"ddpm {command.name}" in command.examples for command in COMMANDS)
    words = "submit --follow --id a -- run x --cluster compose --debug"
    options = parse_arguments(words.split())
    assert options.follow and options.id == "a" and not options.debug
    assert options.job == ["run", "x", "--cluster", "compose", "--debug"]
    options = parse_arguments(["run", "--cluster", "slurm", "digits", "--debug", "train.steps=3"])
    assert (options.words, options.cluster, options.debug) == (["digits", "train.steps=3"], "slurm", True)
    options = parse_arguments(["reproduce", "--budget", "2h", "cifar10", "--dry-run", "data.path=x"])
    assert (options.target, options.words, options.budget) == ("cifar10", ["data.path=x"], "2h")


@pytest.mark.parametrize(("line", "expected"), [
    ("ddpm run dig", {"digits"}), ("ddpm sweep digits_b", {"digits_beta_dropout"}),
    ("ddpm run digits train.precision=", {f"train.precision={n}" for n in ("fp32", "tf32", "bf16")}),
    ("ddpm run --cluster kuberay digits --debug train.ema_w", {"train.ema_warmup="}),
    ("ddpm status cluster.stor", {"cluster.storage="}),
    ("ddpm submit --follow -- sample context_d", {"context_digits"}),
])  # fmt: skip
def test_the_shell_completes(tmp_path, line, expected):
    found = tmp_path / "completions"
    outcome = python(
        "from pipeline.cli.program import main; main()",
        _ARGCOMPLETE="1", COMP_LINE=line, COMP_POINT=str(len(line)), COMP_TYPE="9", _ARGCOMPLETE_IFS="\n",
        _ARGCOMPLETE_STDOUT_FILENAME=str(found), _ARGCOMPLETE_COMP_WORDBREAKS=" ",
    )  # fmt: skip
    assert {word.strip() for word in found.read_text().splitlines()} == expected, outcome.stderr

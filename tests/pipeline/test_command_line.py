"""The command line: what it lists and refuses before anything starts, the runs, lines of progress."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GRID, TINY
from synthetic_run import make_run

from pipeline import console as progress
from pipeline.cli.program import main
from pipeline.store.files import lock_folder, write_json
from pipeline.store.run import LEADERBOARD, locate_study

LAST = ("evaluate.checkpoints=null", "sample.checkpoint=last")


def call(*words: str) -> int | str | None:
    try:
        return main(list(words))
    except SystemExit as end:
        return end.code


def test_without_a_command_there_is_help_and_list_has_every_name(capsys, monkeypatch, tmp_path):
    assert call() in (0, None)
    assert "ddpm COMMAND --help" in capsys.readouterr().out
    assert call("--version") == 0 and "ddpm " in capsys.readouterr().out
    assert call("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"digits", "beta_dropout", "kuberay"} <= {line.split()[0] for line in lines if line[0] == " "}
    assert all(len(line) <= 80 for line in lines)
    monkeypatch.setenv("COLUMNS", "3")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "folder.yaml").mkdir(parents=True)
    (tmp_path / "conf" / "broken.yaml").symlink_to("nowhere")
    (tmp_path / "conf" / "latin.yaml").write_bytes(b"# \xe4\n")
    assert call("list") == 0


def test_a_terminal_of_few_characters_gets_escapes_instead(tmp_path):
    command = [sys.executable, "-m", "pipeline", "show", "digits", "data.source=folder", "data.path=/ü"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0 and r"path: /\xfc" in shown.stdout


JOB, HERE = "submit -- run digits", "cluster.storage=/data/runs"
SEND, NOWHERE = "submit --cluster kuberay", "submit --address http://127.0.0.1:9"
TRAIN = " ".join(["train digits", *TINY, "cluster.workers=0 cluster.storage={tmp}"])


@pytest.mark.parametrize(("words", "code", "message"), [  # words, exit code, what the error says
    ("register x --name a/b", 2, "a/b"), ("register x --alias V12", 2, "V12"), ("register x --alias ''", 2, "--alias"),
    ("export models:/x@y dir --step 3", 2, "--step"), ("export models:/x@y dir --weights raw", 2, "--weights"),
    ("ui --port 99999", 2, "65535"), ("ui --port -1", 2, "port"), ("ui --port 0", 2, "65535"),
    ("ui --port ²", 2, "65535"), ("export a b --step 1e30", 2, "whole number"), ("export a", 2, "DIR"),
    ("rnu", 2, "did you mean 'run'?"), ("list digits", 2, "digits"), ("jobs foo", 2, "'foo'"),
    ("run digits train.steps", 2, "key=value"), ("run nowhere.yaml", 2, "does not exist"),
    ("run digits --clustr local", 2, "did you mean '--cluster'?"), ("run digts", 2, "did you mean 'digits'?"),
    ("run digits model.dropuot=1", 2, "did you mean 'dropout'?"), ("run digits cifar10", 2, "one experiment"),
    ("run digits cluster.wokers=2", 2, "cluster.wokers is unknown (did you mean 'workers'?)"),
    ("run digits evaluate.extractor_weights=/n.pth cluster.storage={tmp}", 2, "'/n.pth' is not a file"),
    ("run digits --cluster nowhere", 2, "no cluster is named 'nowhere'"),
    ("run digits cluster.storage=/dev/null/runs", 1, "cannot be written"),
    ("run cifar10 data.path=/nowhere cluster.storage={tmp}", 1, "/nowhere"),
    ("sync nowhere cluster.storage={tmp}", 1, "no run directory"),
    (f"{TRAIN} cluster.tracking_uri=http://127.0.0.1:9", 1, "http://127.0.0.1:9"),
    ("compare nothing digits cluster.storage={tmp}", 1, "error: 'nothing' is no run directory"),
    ("compare digits cluster.storage={tmp}", 2, "error: compare needs two runs or more, and only digits-"),
    ("compare digits --metric fod", 2, "error: --metric fod is unknown (did you mean 'fid'?)"),
    # Sweeps
    ("sweep", 2, "which sweep?"), ("sweep {grid} {grid}", 2, "one sweep at a time"),
    ("sweep digits_beta_dropuot", 2, "did you mean 'digits_beta_dropout'?"),
    ("sweep {grid} sweep.rank.metrik=fid", 2, "did you mean 'metric'?"),
    ("sweep {grid} model.dropout=0.5", 2, "model.dropout=0.5: grid sweeps this key"),
    (f"submit -- sweep beta_dropout data.path=images {HERE}", 2, "data.path=images is a relative path"),
    (f"submit -- sweep beta_dropout train.stepz=3 {HERE}", 2, "did you mean 'steps'?"),
    (f"submit -- reproduce cifar10 --budget=soon {HERE}", 2, "a number of steps (2000)"),
    (f"submit -- reproduce cifar10 data.path=images {HERE}", 2, "data.path=images is a relative path"),
    # Jobs, of which nothing is sent
    ("submit", 2, "write the command after --"), ("submit run digits", 2, "write the command after --"),
    ("submit -- status", 2, "'status' cannot be submitted"), ("jobs stop", 2, "takes one job id"),
    ("submit -- submit -- run", 2, "'submit' cannot be submitted"), ("jobs list --follow", 2, "belongs to"),
    (f"{NOWHERE} -- run digits train.batch_size=2 cluster.workers=3 {HERE}", 1, "3 workers cannot share"),
    (f"{NOWHERE} -- run digits {HERE}", 1, "no Ray cluster answers at http://127.0.0.1:9"),
    # a file that only the cluster has may be named
    (f"{NOWHERE} -- run cifar10 data.path=/a evaluate.extractor_weights=/b {HERE}", 1, "no Ray cluster"),
    ("submit -- run digts", 2, "did you mean 'digits'?"), (JOB, 2, "cluster.storage=runs is a relative path"),
    (f"{JOB} cluster.storage=~/runs", 2, "cluster.storage=~/runs is a relative path"),
    (f"submit -- run cifar10 data.path=~/images {HERE}", 2, "data.path=~/images is a relative path"),
    (f"{JOB} cluster.tracking_uri=sqlite:///mlflow.db {HERE}", 2, "an absolute one has four"),
    (f"{JOB} cluster.tracking_uri=http://me:secret@host {HERE}", 2, "MLFLOW_TRACKING_PASSWORD"),
    (f"submit --id a/b -- run digits {HERE}", 2, "--id a/b names a file"),
    (f"{SEND} -- run digits cluster.storage=runs", 2, "cluster.storage=runs is a relative path"),
    (f"{SEND} -- run conf/digits.yaml", 2, "is a configuration of this folder"),
    (f"{SEND} --template {{tmp}}/pipe -- run digits", 2, "pipe is no RayJob"),
    ("run digits diffusion.betas={tmp}/pipe", 2, "pipe is no .npy file"),
    ("draw nowhere --seed 8e15", 2, "whole number"),
    (f"draw nowhere --seed {2**63 - 1} cluster.storage={{tmp}}", 1, "'nowhere' is no run directory"),
    (f"{SEND} --template README.md -- run digits", 2, "README.md is no RayJob"),
    # Outputs that cannot be written are told before the work
    ("draw nowhere {tmp}/grid.yaml/x/y.png", 1, "grid.yaml is no folder"),
    ("draw nowhere {tmp}/pipe", 1, "pipe exists"),
    ("export nowhere {tmp}", 1, "not an empty folder"), ("export nowhere {tmp}/pipe/out", 1, "pipe is no folder"),
])  # fmt: skip
def test_a_mistake_is_told_in_a_line_or_two(tmp_path, capsys, words, code, message):
    (tmp_path / "grid.yaml").write_text(GRID)
    os.mkfifo(tmp_path / "pipe")
    if words.startswith("compare"):
        make_run(tmp_path)
    words = words.replace("{tmp}", str(tmp_path)).replace("{grid}", str(tmp_path / "grid.yaml"))
    assert call(*words.split()) == code
    error = capsys.readouterr().err
    assert message in error and "secret" not in error
    assert len([line for line in error.splitlines() if not line.startswith(("usage:", " "))]) <= 2


def test_show_and_a_refused_command_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "digits"]) == 0
    assert not list(Path(tmp_path).iterdir())
    assert main(["shard", "digits", "cluster.workers=99", f"cluster.storage={tmp_path}"]) == 1
    assert "lower cluster.workers" in capsys.readouterr().err
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    assert main(["import", "weights", "digits", "cluster.workers=0", f"cluster.storage={tmp_path}"]) in (1, 2)
    assert not list(tmp_path.glob("digits-*")) and not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(("words", "answer", "code", "gone"), [
    ("", "", 2, ""), ("a b", "", 1, ""), ("digits", "y", 1, ""), ("{failed}", "", 1, ""), ("{failed}", "n", 1, ""),
    ("{failed}", "y", 0, "failed"), ("--failed --yes", "", 0, "failed"), ("{ranked} --yes", "", 1, ""),
    ("{ranked} --yes --force", "", 0, "ranked"), ("{busy} --yes --force", "", 1, ""),
    ("--samples --yes {failed}", "", 1, ""), ("--samples --yes --force {failed}", "", 0, "failed/samples"),
])  # fmt: skip
def test_rm_deletes_what_nothing_refers_to_after_a_question(tmp_path, monkeypatch, words, answer, code, gone):
    names = ("failed", "ranked", "busy")
    runs = {name: make_run(tmp_path, "digits", (f"seed={seed}",)) for seed, name in enumerate(names)}
    write_json(runs["failed"].tracking_json, {"status": "FAILED"})
    write_json(locate_study(tmp_path, "s") / LEADERBOARD, {"trials": [{"run": runs["ranked"].name}]})
    monkeypatch.setattr("sys.stdin", io.StringIO(answer) if answer else None)  # a closed one is None
    with lock_folder(runs["busy"].path):
        named = words.format(**{name: run.name for name, run in runs.items()}).split()
        assert main(["rm", *named, f"cluster.storage={tmp_path}"]) == code
    assert {name for name, run in runs.items() if run.path.exists()} == set(names) - {gone}
    assert runs["failed"].samples.exists() == (not gone.startswith("failed"))
    write_json(locate_study(tmp_path, "s") / LEADERBOARD, {})
    assert main(["rm", runs["busy"].name, "--yes", f"cluster.storage={tmp_path}"]) == 1


def test_rm_of_a_link_deletes_the_run_that_it_leads_to(tmp_path):
    run = make_run(tmp_path / "runs", "digits")
    moved = run.path.rename(tmp_path / run.path.name)
    run.path.symlink_to(moved)
    assert main(["rm", run.name, "--yes", f"cluster.storage={tmp_path / 'runs'}"]) == 0
    assert not moved.exists() and not list((tmp_path / "runs").glob(f"*{run.name}*"))


def test_status_shows_whole_names_the_newest_first_within_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["status", f"cluster.storage={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert str(tmp_path) in told and "cluster.storage=" in told
    runs = [make_run(tmp_path, "cifar10_vlb_mean_learned", (f"seed={seed}", *LAST)) for seed in range(4)]
    for age, (run, status) in enumerate(zip(runs, ("RUNNING", "FAILED", "KILLED", None), strict=True)):
        write_json(run.tracking_json, {"status": status} if status else {})
        for file in run.path.rglob("*"):
            os.utime(file, (1.7e9 - age, 1.7e9 - age))
    with lock_folder(runs[3].path):
        assert main(["status", f"cluster.storage={tmp_path}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        log = runs[3].log.read_text().splitlines(keepends=True)
        runs[3].log.write_text("".join(log[: len(log) // 2]))
        assert main(["status", f"cluster.storage={tmp_path}"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.endswith(runs[3].name))
    assert re.fullmatch(r"running +\d s +9 h +400000/800000 .*", row), row
    assert all(len(line) <= 80 for line in lines[1:])
    rows = [line.split() for line in lines if line.endswith(tuple(run.name for run in runs))]
    assert [row[0] for row in rows] == ["interrupted", "failed", "interrupted", "stalled"]
    assert [row[-1] for row in rows] == [run.name for run in runs] and rows[0][2] == "d"


@pytest.mark.parametrize(("work", "start", "updates", "lines"), [
    # name, total and words of the work; (seconds later, done, note) of each update; the lines
    # the time left is of the work's own pace, without the start
    (("train", 100, "steps"), 0, [(60, 1), (20, 21, "loss 0.1"), (79, 100)],
     ["train: 1/100 steps", "train: 21/100 steps, 1/s, 1 min 19 s left, loss 0.1",
      "train: 100/100 steps, 1/s"]),
    # a resumed stage does not count what was there
    (("train", 1000, "steps"), 600, [(20, 601), (20, 611)],
     ["train: 601/1000 steps", "train: 611/1000 steps, 30/min, 12 min 58 s left"]),
    # lines are seldom, and news
    (("sample", 10, "images"), 0, [(10, 1), (10, 2), (10, 2), (60, 2)],
     ["sample: 2/10 images, 6/min, 1 min 20 s left"]),
    (("sweep", 2, "trials"), 0, [(20, 0, "a 1/6"), (20, 0, "a 2/6"), (20, 0, "a 2/6")],
     ["sweep: 0/2 trials, a 1/6", "sweep: 0/2 trials, a 2/6"]),
    # large units that end together count from the beginning
    (("sweep", 6, "trials"), 0, [(300, 1), (20, 2)],
     ["sweep: 1/6 trials", "sweep: 2/6 trials, 22.5/h, 10 min 40 s left"]),
])  # fmt: skip
def test_lines_of_progress(monkeypatch, work, start, updates, lines):
    clock, said = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "print_line", said.append)
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: False, raising=False)
    with progress.show_progress(*work, start=start) as shown:
        for seconds, *update in updates:
            clock[0] += seconds
            shown.update(*update)
    assert said == lines

    assert "metrics=[nll]" in progress.format_table(["command"], [["metrics=[nll]"]])
    assert list(map(progress.format_rate, (23_710.0, 13.26, 0.0512))) == ["23,710/s", "13.3/s", "3.07/min"]

"""Several runs on one page: who is ranked with whom, what is drawn over what, and the command."""

import re
from dataclasses import replace

import pytest
from conftest import blank_charts
from synthetic_run import make_run

from pipeline.cli.program import main
from pipeline.report import comparison
from pipeline.report.compared_run import ComparedRun, make_compared_runs
from pipeline.scores.metrics import METRICS
from pipeline.scores.ranking import rank_runs
from pipeline.stages import report
from pipeline.store import files as rundir

SPACE = [(beta, dropout) for beta in ("linear", "cosine") for dropout in (0.2, 0.1)]
SHORT = ("train.steps=400", "train.checkpoint_every=200")


def compared(storage, *overrides: str, label: str = "", name: str = "digits", **swept) -> ComparedRun:
    return ComparedRun(label, make_run(storage, name, (*SHORT, *overrides)), swept)


def score(one: ComparedRun, protocol: dict | None = None, **scores: float) -> None:
    metrics = rundir.read_json(one.place.metrics_json, dict)
    metrics["scores"] = {"rate_bpd": 1.0, "distortion_bpd": 1.0, **scores}
    metrics["protocol"] |= protocol or {}
    rundir.write_json(one.place.metrics_json, metrics)
    rundir.write_manifest(one.place.scores, ["metrics.json", "nll.json"])


def reread(runs) -> list[ComparedRun]:
    return [replace(run) for run in runs]


@pytest.fixture
def four(tmp_path):
    found, scores = [], ((30.0, 1.0), (10.0, 2.0), (20.0, 4.0), (40.0, 3.0))
    for (beta, dropout), (fid, is_mean) in zip(SPACE, scores, strict=True):
        swept = {"diffusion.beta_schedule": beta, "model.dropout": dropout}
        overrides = (f"{key}={value}" for key, value in swept.items())
        found.append(compared(tmp_path, *overrides, label=f"{beta}-{dropout}", **swept))
        score(found[-1], fid=fid, is_mean=is_mean, nll_bpd=fid / 10)
    return found


def page(runs, folder, metric: str = "fid", note: str = "") -> str:
    html = comparison.write_comparison(reread(runs), folder, "Four", METRICS[metric], note)
    return html.with_suffix(".md").read_text().replace("\u00a0", " ")


def test_the_best_comes_first_and_losses_share_a_panel_under_the_same_objective(four, tmp_path, undrawn):
    for metric, order, words in (
        ("fid", ["linear-0.1", "cosine-0.2", "linear-0.2", "cosine-0.1"], "lowest FID"),
        ("is_mean", ["cosine-0.2", "cosine-0.1", "linear-0.1", "linear-0.2"], "highest IS"),
    ):
        markdown = page(four, tmp_path / "page", metric)
        assert re.findall(r"^\| \d\. (\S+) \|", markdown, re.MULTILINE) == order
        assert f"> **{order[0]} has the {words} of 4" in markdown
    assert "Compared with the paper" not in markdown
    assert "2 objectives" in markdown
    titles = re.findall(r"!\[(Loss.*?), smoothed\]", markdown)
    assert titles == ["Loss, beta_schedule linear", "Loss, beta_schedule cosine"]
    markdown = page(four[:2], tmp_path / "page")
    assert re.findall(r"!\[(Loss.*?), smoothed\]", markdown) == ["Loss"] and "the same objective" in markdown
    for loss, same in (("simple", True), ("vlb", False)):
        words = ((f"diffusion.loss={loss}", f"diffusion.variance=fixed{size}") for size in ("large", "small"))
        one, other = (compared(tmp_path, *its).objective for its in words)
        assert (one == other) is same


def test_samples_drawn_otherwise_are_compared_and_scores_of_other_protocols_are_not(four, tmp_path, undrawn):
    score(four[1], {"weights": "raw"}, fid=5.0)
    score(four[0], nll_bpd=3.0)
    markdown = page(four, tmp_path / "page")
    assert "No common order" not in markdown, "EMA against raw is a fair question"
    assert "| Weights |" in markdown
    assert re.search(r"^\| 1\. linear-0\.1 \|.* raw \|$", markdown, re.MULTILINE)
    assert "Without FID: linear-0.2." in markdown and "| 3. cosine-0.1 |" in markdown
    protocol = rundir.read_json(four[1].place.metrics_json, dict)["protocol"]
    for other in ({"n": 64}, {"extractor": "another"}, {"reference": "test"}):
        score(four[1], protocol | other, fid=1.0)
        markdown = page(four, tmp_path / "page")
        assert "> **No common order: the runs were scored by 2 protocols" in markdown
        found = re.findall(r"^\| (\d\. \S+) \|", markdown, re.MULTILINE)
        assert found == ["1. cosine-0.2", "2. cosine-0.1", "1. linear-0.1"]
        assert str(next(iter(other.values()))) in markdown


def test_two_swept_keys_make_a_matrix(four):
    files = {run.label: f"{run.label}.png" for run in four}
    matrix = comparison.arrange_pictures(four[:3], files, ["diffusion.beta_schedule", "model.dropout"])
    assert isinstance(matrix, comparison.PictureMatrix) and not matrix.has_captions
    assert matrix.columns == ["linear", "cosine"]
    found = {row: [[picture.name for picture in cell] for cell in cells] for row, cells in matrix.rows}
    assert found == {"0.1": [["linear-0.1.png"], []], "0.2": [["linear-0.2.png"], ["cosine-0.2.png"]]}


def test_scores_are_drawn_against_the_swept_number_with_the_most_values(tmp_path, monkeypatch):
    """Two lines of three lengths; seeds are the error of a point, and a number of two values makes no axis."""
    drawn, runs = [], []
    monkeypatch.setattr(comparison, "save_picture", lambda _, name, panel, __: drawn.append(panel) or name)
    scores = {(0.0, 20): 9.0, (0.0, 5): 30.0, (0.0, 80): 4.0, (1.0, 5): 20.0, (1.0, 20): 8.0, (1.0, 80): 6.0}
    for seed in (0, 1):
        for (eta, steps), fid in scores.items():
            swept = {"sample.eta": eta, "sample.steps": steps, "seed": seed}
            run = compared(tmp_path, *(f"{k}={v}" for k, v in swept.items()), label=f"{swept}", **swept)
            score(run, fid=fid + seed)
            runs.append(run)
    groups = rank_runs(reread(runs), METRICS["fid"])
    assert comparison.draw_scores(groups, METRICS["fid"], tmp_path) == ["scores-0"]
    (panel,) = drawn
    assert (panel.title, panel.x) == ("FID", "steps")
    found = {line.label: (line.x, line.y) for line in panel.lines}
    assert found == {"eta=0.0": ((5, 20, 80), (30.5, 9.5, 4.5)), "eta=1.0": ((5, 20, 80), (20.5, 8.5, 6.5))}
    assert all(line.band.tolist() == pytest.approx([0.5**0.5] * 3) for line in panel.lines)
    two = rank_runs(reread([run for run in runs if run.swept["sample.steps"] != 80]), METRICS["fid"])
    assert comparison.draw_scores(two, METRICS["fid"], tmp_path) == []


def test_the_page_is_whole_and_leads_to_each_report(four, tmp_path):
    with blank_charts():
        assert list(report.STAGE.work(four[0].place)) == []
    html = comparison.write_comparison(four[:2], tmp_path / "comparisons" / "x", "Two")
    place = re.findall(r'href="(\.\./[^"]+)"', html.read_text())
    assert place == [f"../../{four[0].place.name}/report/report.html"]
    assert (html.parent / place[0]).is_file()
    manifest = rundir.read_manifest(html.parent, dict, "sha256")
    names = set(re.findall(r"!\[.*?\]\((.*?)\)", html.with_suffix(".md").read_text()))
    assert names | {"report.html", "report.md"} == set(manifest["files"])
    assert sum(name.startswith("grid-") for name in names) == 2
    assert "<script" not in html.read_text() and not re.search(r"url\((?!#)", html.read_text())


def test_the_command_takes_names_beginnings_and_paths(four, tmp_path, undrawn, capsys):
    found = make_compared_runs(one.place for one in four)
    assert [(one.swept, one.label) for one in found] == [(one.swept, one.place.name) for one in four]
    names = sorted(one.place.name for one in four)
    written = set()
    for runs in ([names[0], str(tmp_path / names[1]), *names[2:]], ["digits"], [*names, "digits-"]):
        assert main(["compare", *runs, f"cluster.storage={tmp_path}"]) == 0
        written.add(capsys.readouterr().out.split("comparison: ")[1].strip())
    (path,) = written
    assert path.startswith((tmp_path / "comparisons").as_uri()) and path.endswith("report.html")
    assert main(["compare", "digits", "--metric", "nll", f"cluster.storage={tmp_path}"]) == 0
    assert path not in capsys.readouterr().out, "another order is another page"


def test_rows_of_the_papers_tables_stand_beside_the_papers(tmp_path, undrawn):
    runs = []
    for name, fid in (("cifar10", 7.0), ("cifar10_vlb_eps_fixed", 20.0)):
        overrides = "train.steps=10000 train.log_every=1000 evaluate.checkpoints=null sample.checkpoint=last"
        runs.append(compared(tmp_path, *overrides.split(), label=name, name=name, experiment=name))
        score(runs[-1], fid=fid, nll_bpd=3.9, rmse=1.0)
    markdown = page(runs, tmp_path / "page", note="scaled down")
    assert "\nScaled down.\n" in markdown
    beside = markdown.partition("## Compared with the paper")[2].partition("\n## ")[0]
    assert re.search(r"^\| \*\*cifar10\*\* \| 7\.00 \|.*not comparable", beside, re.MULTILINE)
    assert beside.index("7.67") < beside.index("cifar10_vlb_eps_fixed") < beside.index("L_simple")
    assert "Not yet useful" not in markdown
    score(runs[0], fid=7.0, rmse=1.2)
    assert "**Not yet useful**: 1 of the 2 networks does not beat" in page(runs, tmp_path / "page")

"""Several runs on one page: who is ranked with whom, what is drawn over what, and the command."""

from __future__ import annotations

import re

import pytest
from synthetic_run import make_run

from pipeline.cli.program import main
from pipeline.drawing import charts
from pipeline.report import compare
from pipeline.report.axes import Matrix, arrange
from pipeline.report.entries import Entry, name_briefly
from pipeline.scores.metrics import METRICS
from pipeline.scores.ranking import rank_runs
from pipeline.stages import report
from pipeline.store import files as rundir

SPACE = [(beta, dropout) for beta in ("linear", "cosine") for dropout in (0.2, 0.1)]


def entry(storage, beta: str, dropout: float, label: str = "", **swept) -> Entry:
    overrides = (f"diffusion.beta_schedule={beta}", f"model.dropout={dropout}")
    experiment, run = make_run(storage, "digits", overrides)
    values = {"diffusion.beta_schedule": beta, "model.dropout": dropout, **swept}
    return Entry(label or f"{beta}-{dropout}", run.of(experiment), values)


def score(one: Entry, protocol: dict | None = None, **scores: float) -> None:
    file = one.place.metrics_json
    metrics = rundir.read_json(file)
    whole = {"rate_bpd": 1.0, "distortion_bpd": 1.0, **scores}
    metrics["scores"], metrics["protocol"] = whole, metrics["protocol"] | (protocol or {})
    rundir.write_json(file, metrics)


@pytest.fixture
def four(tmp_path):
    found = [entry(tmp_path, *values) for values in SPACE]
    for one, fid, is_mean in zip(found, (30.0, 10.0, 20.0, 40.0), (1.0, 2.0, 4.0, 3.0), strict=True):
        score(one, fid=fid, is_mean=is_mean, nll_bpd=fid / 10)
    return found


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(charts, "save_panels", lambda panels, file: file.write_text("<svg></svg>"))


def page(entries, folder, metric: str = "fid") -> str:
    html = compare.write_comparison(entries, folder, "Four", METRICS[metric])
    return html.with_suffix(".md").read_text().replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("metric", "order"),
    [
        ("fid", ["linear-0.1", "cosine-0.2", "linear-0.2", "cosine-0.1"]),
        ("is_mean", ["cosine-0.2", "cosine-0.1", "linear-0.1", "linear-0.2"]),  # more is better
    ],
)
def test_the_best_comes_first_whichever_way_the_metric_points(four, tmp_path, undrawn, metric, order):
    markdown = page(four, tmp_path / "page", metric)
    assert re.findall(r"^\| \d\. (\S+) \|", markdown, re.MULTILINE) == order
    assert f"> **{order[0]} has the {METRICS[metric].best} {METRICS[metric].heading} of 4" in markdown


@pytest.mark.parametrize("other", [{"n": 64}, {"extractor": "another"}, {"reference": "test"}])
def test_what_was_scored_otherwise_is_not_ranked_with_the_rest(four, tmp_path, undrawn, other):
    score(four[1], other, fid=1.0)
    markdown = page(four, tmp_path / "page")
    assert "> **No common order: the runs were scored by 2 protocols" in markdown
    assert re.findall(r"^\| (\d)\. (\S+) \|", markdown, re.MULTILINE) == [
        ("1", "cosine-0.2"), ("2", "linear-0.2"), ("3", "cosine-0.1"), ("1", "linear-0.1")
    ]  # fmt: skip
    assert str(next(iter(other.values()))) in markdown


def test_how_samples_were_drawn_is_compared_and_shown(four, tmp_path, undrawn):
    score(four[0], {"weights": "raw"}, fid=5.0)
    markdown = page(four, tmp_path / "page")
    assert "No common order" not in markdown, "EMA against raw is a fair question"
    assert "| Weights |" in markdown and re.search(
        r"^\| 1\. linear-0\.2 \|.* raw \|$", markdown, re.MULTILINE
    )


def test_other_images_are_another_protocol(four, tmp_path):
    experiment, run = make_run(tmp_path, "digits", ("data.test_images=7",))
    other = Entry("other", run.of(experiment), {})
    assert [len(group.runs) for group in rank_runs([*four, other], METRICS["fid"])] == [4, 1]


def test_a_run_without_the_score_is_named_and_not_ranked(four, tmp_path, undrawn):
    score(four[0], nll_bpd=3.0)
    markdown = page(four, tmp_path / "page")
    assert "Without FID: linear-0.2." in markdown and "| 3. cosine-0.1 |" in markdown


def test_losses_share_a_panel_only_under_the_same_objective(four, tmp_path, undrawn):
    markdown = page(four, tmp_path / "page")
    assert "2 objectives" in markdown
    assert re.findall(r"!\[(Loss.*?), smoothed\]", markdown) == [
        "Loss, beta_schedule linear",
        "Loss, beta_schedule cosine",
    ]
    markdown = page(four[:2], tmp_path / "page")
    assert re.findall(r"!\[(Loss.*?), smoothed\]", markdown) == ["Loss"] and "the same objective" in markdown


def test_the_variance_makes_another_objective_only_where_the_loss_depends_on_it(tmp_path):
    def objective(*overrides: str) -> dict:
        experiment, run = make_run(tmp_path, "digits", overrides)
        return Entry("", run.of(experiment), {}).objective

    fixed = ["diffusion.variance=fixedlarge", "diffusion.variance=fixedsmall"]
    assert objective(fixed[0]) == objective(fixed[1])
    assert objective("diffusion.loss=vlb", fixed[0]) != objective("diffusion.loss=vlb", fixed[1])


def test_two_swept_keys_make_a_matrix(four):
    files = {e.label: f"{e.label}.png" for e in four}
    matrix = arrange(four[:3], files, ["diffusion.beta_schedule", "model.dropout"])
    assert isinstance(matrix, Matrix) and not matrix.has_captions
    assert matrix.columns == ["linear", "cosine"]
    assert [(row, [[p.name for p in found] for found in cells]) for row, cells in matrix.rows] == [
        ("0.1", [["linear-0.1.png"], []]), ("0.2", [["linear-0.2.png"], ["cosine-0.2.png"]])
    ]  # fmt: skip


def test_a_third_key_stands_in_the_captions_and_one_key_makes_a_row(tmp_path):
    found = [entry(tmp_path, "linear", 0.1, f"seed-{seed}", seed=seed) for seed in (11, 2)]
    files = {e.label: f"{e.label}.png" for e in found}
    keys = ["diffusion.beta_schedule", "model.dropout", "seed"]
    matrix = arrange(found, files, keys)
    assert isinstance(matrix, Matrix) and matrix.has_captions
    assert [p.caption for p in matrix.rows[0][1][0]] == ["seed 2", "seed 11"]
    row = arrange(found, files, ["seed"])
    assert isinstance(row, list) and [p.caption for p in row] == ["seed 2", "seed 11"]
    assert name_briefly(found, keys) == {"seed-11": "linear · 0.1 · 11", "seed-2": "linear · 0.1 · 2"}
    same = {"seed-11": "seed-11", "seed-2": "seed-2"}
    assert name_briefly(found, keys[:2]) == same, "values that tell nothing apart"


def test_the_page_is_whole_and_leads_to_each_report(four, tmp_path):
    assert list(report.STAGE.work(four[0].place)) == []
    html = compare.write_comparison(four, tmp_path / "comparisons" / "x", "Four")
    place = re.findall(r'href="(\.\./[^"]+)"', html.read_text())
    assert place == [f"../../{four[0].place.name}/report/report.html"]
    assert (html.parent / place[0]).is_file()
    manifest = rundir.read_manifest(html.parent, "sha256")
    names = set(re.findall(r"!\[.*?\]\((.*?)\)", html.with_suffix(".md").read_text()))
    assert names | {"report.html", "report.md"} == set(manifest["files"])
    assert sum(name.startswith("grid-") for name in names) == 4
    assert "<script" not in html.read_text() and not re.search(r"url\((?!#)", html.read_text())


def test_one_run_may_be_seen_under_two_experiments(tmp_path, undrawn, monkeypatch):
    """What only sampling differs in is one run directory: its loss is one curve."""
    experiment, run = make_run(tmp_path)
    other, same = make_run(tmp_path, "digits", ("sample.steps=50",))
    assert run.path == same.path
    found = [
        Entry("250", run.of(experiment), {"sample.steps": 250}),
        Entry("50", same.of(other), {"sample.steps": 50}),
    ]
    drawn, losses = [], charts.plot_losses
    monkeypatch.setattr(charts, "plot_losses", lambda title, runs: drawn.append(runs) or losses(title, runs))
    markdown = page(found, tmp_path / "page")
    assert [len(runs) for runs in drawn] == [1]
    assert markdown.count("![") >= 4


# The command


def test_the_command_takes_names_beginnings_and_paths(four, tmp_path, undrawn, capsys):
    names = sorted(one.place.name for one in four)
    words = ([names[0], str(tmp_path / names[1]), *names[2:]], ["digits"], [*names, "digits-"])
    said = set()
    for runs in words:
        assert main(["compare", *runs, f"cluster.storage={tmp_path}"]) == 0
        said.add(capsys.readouterr().out.split("comparison: ")[1].strip())
    (path,) = said
    assert path.startswith(str(tmp_path / "comparisons")) and path.endswith("report.html")
    assert main(["compare", "digits", "--metric", "nll", f"cluster.storage={tmp_path}"]) == 0
    assert path not in capsys.readouterr().out, "another order is another page"


def test_the_command_finds_what_differs(four, tmp_path, undrawn):
    found = compare.list_entries(one.place for one in four)
    assert [one.swept for one in found] == [one.swept for one in four]
    assert [one.label for one in found] == [one.place.name for one in four]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nothing", "digits"], "error: 'nothing' is no run directory"),
        (["digits"], "error: compare needs two runs or more, and only digits-"),
        (["digits", "--metric", "fod"], "error: --metric fod is unknown (did you mean 'fid'?)"),
    ],
)
def test_mistakes_are_a_line(tmp_path, capsys, words, complaint):
    make_run(tmp_path)
    assert main(["compare", *words, f"cluster.storage={tmp_path}"]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(complaint) and error.count("\n") == 1


def test_rows_of_the_papers_tables_stand_beside_the_papers(tmp_path, undrawn):
    entries = []
    for name, fid in (("cifar10", 7.0), ("cifar10_vlb_eps_fixed", 20.0)):
        experiment, run = make_run(tmp_path, name, ("train.steps=10000",))
        entries.append(Entry(name, run.of(experiment), {"experiment": name}))
        score(entries[-1], fid=fid, nll_bpd=3.9, rmse=1.0)
    note = "scaled down"
    written = (
        compare.write_comparison(entries, tmp_path / "page", "Two", METRICS["fid"], note)
        .with_suffix(".md")
        .read_text()
    )
    markdown = written.replace("\u00a0", " ")
    assert "\nScaled down.\n" in markdown
    beside = markdown.partition("## Beside the paper")[2].partition("\n## ")[0]
    rows = [line for line in beside.splitlines() if line.startswith(("| ε, L_simple", "| **cifar10** |"))]
    assert re.match(r"\| ε, L_simple \| 3\.17 \| 5\.24 \| 9\.46 ± 0\.11 \| ≤ 3\.75 \| the paper \|", rows[0])
    assert re.match(r"\| \*\*cifar10\*\* \| 7\.00 \|.*not comparable", rows[1])
    assert beside.index("7.67") < beside.index("cifar10_vlb_eps_fixed") < beside.index("L_simple")
    assert "Not yet useful" not in markdown
    score(entries[0], fid=7.0, rmse=1.2)
    again = [Entry(one.label, one.place, one.swept) for one in entries]
    assert "**Not yet useful**: only 1 of the 2 networks beats" in page(again, tmp_path / "page")


def test_runs_of_one_row_are_not_put_beside_the_paper(four, tmp_path, undrawn):
    assert "Beside the paper" not in page(four, tmp_path / "page")

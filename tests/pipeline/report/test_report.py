"""The report from synthetic run directories: what stands in it, what it leaves out, and when it is remade."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from synthetic_run import make_run, write_grid, write_scores

from pipeline import config
from pipeline.report import paper
from pipeline.report.page import convert_to_html
from pipeline.report.run_files import RunFiles
from pipeline.report.run_page import compare_with_linear_denoiser, list_differences_from_paper
from pipeline.stages import report
from pipeline.store import files as rundir

CIFAR10 = (
    "train.steps=20000", "train.sample_every=10000", "train.checkpoint_every=10000", "train.log_every=1000",
    "evaluate.checkpoints=null", "sample.checkpoint=last",
)  # fmt: skip


def write(run) -> tuple[str, str]:
    assert list(report.STAGE.work(run)) == []
    return run.report_html.read_text(), run.report_html.with_suffix(".md").read_text().replace("\u00a0", " ")


@pytest.fixture
def make(tmp_path, undrawn):
    """Makes a run whose plots are not drawn: they take most of the time, and few tests look at them."""

    def make(name: str = "digits", *overrides: str, **options: bool):
        longer = CIFAR10 if "cifar10" in name else ()
        return make_run(tmp_path, name, (*longer, *overrides), **options)

    return make


def change_scores(run, **changed) -> None:
    metrics = rundir.read_json(run.metrics_json, dict)
    parts = {name: metrics[name] | changed.pop(name, {}) for name in ("scores", "protocol")}
    rundir.write_json(run.metrics_json, metrics | parts | changed)
    rundir.write_manifest(run.scores, ["metrics.json", "nll.json"])


def test_the_page_fetches_and_runs_nothing_and_its_markdown_twin_has_its_pictures_beside_it(tmp_path):
    html, markdown = write(run := make_run(tmp_path))
    assert not re.search(r"<(script|link|iframe|svg)\b|@import|url\((?!#)", html)
    places = re.findall(r'\b(?:src|href)="(.*?)"', html)
    assert places and all(re.match(r"data:image/(png|svg\+xml);base64,|#", place) for place in places)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in html
    names = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(names) >= 14 and len(names) == len(set(names))
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == re.findall(r"<h2>(.*?)</h2>", html)
    files = rundir.read_manifest(run.report, dict, "sha256")["files"]
    assert set(files) == {"report.html", "report.md", *names}


def test_other_images_stand_beside_reference_points_only_and_what_made_the_run_is_named(make):
    run = make()
    rundir.write_json(run.timings_json, {"train": 130.0, "report": 2.0})
    markdown = write(run)[1]
    assert "> After 1,200 training steps: FID 14.21 (test images 31.00 at n = 360), IS 9.02" in markdown
    for row in (
        "|  | **This run** | Test images | Gaussian | Noise |", "| FID | 14.21 | 31.00 | 96.40 | 2,288.00 |",
        "| IS | 9.02 | 9.30 | 3.10 | 1.20 |\n| IS, spread of its splits | 0.21 | 0.30 | – | – |",
        "| NLL, bits/dim | ≤ 4.520 | – | – | – |", "| Images | 512 | 360 | 512 | 512 |",
        "| Feature extractor | classifier-0a1b2c3d |", "| Commit | `0123456789abcdef0123456789abcdef01234567` |",
        "| Time | train 2 min 10 s |", "8.0% to 13.0% of the samples", "![Samples, the first 8](first-samples.png)",
        "| Command | ddpm run digits name=\\`a\\` |\n| Host | vm |", "beta_schedule: linear",
    ):  # fmt: skip
        assert row in markdown
    for absent in ("Table 1", "paper 3.17", "not comparable", "Not yet useful"):
        assert absent not in markdown
    server = {"experiment_id": "3", "run_id": "r7", "parcels": {}, "study": "s"}
    rundir.write_json(run.tracking_json, {"servers": {"http://a:5": server}})
    rundir.write_json(run.commits_json, {"train": ["a1", "b2"], "evaluate": ["b2"], "report": ["c3"]})
    markdown = write(run)[1]
    assert "](http://a:5/#/experiments/3/runs/r7?workflowType=machine_learning) |" in markdown
    assert "| Commit | train `a1` · train, evaluate `b2` |" in markdown


def test_cifar10_stands_beside_the_paper(make):
    markdown = write(make("cifar10"))[1]
    papers = "| ε, L_simple | 3.17 | 5.24 | 9.46 ± 0.11 | ≤ 3.75 |"
    own_row = f"{papers}\n| **this run** | 14.21 | – | 9.02 | ≤ 4.520 |"
    assert f"{own_row}\n| *difference, across protocols* | +11.04 | – | −0.44 | +0.77 |" in markdown
    assert "| μ̃, L, learned diagonal Σ | 23.69 | – | 7.28 ± 0.10 | – |" in markdown
    assert "**Not comparable with the paper**: n = 512 images" in markdown
    found = re.search(r"\| 1,000 \| (\S+) \| 1.77581 \| (\S+) \| (\S+) \| 0.95136 \| (\S+) \|", markdown)
    rate, off, rmse, off_rmse = (float(number.replace("−", "-")) for number in found.groups())
    assert (rate - 1.77581, rmse - 0.95136) == pytest.approx((off, off_rmse), abs=1.1e-5)
    assert len(re.findall(r"^\| [\d,]*00 \|", markdown, re.MULTILINE)) == 10
    assert "`train.steps` is 20,000, not 800,000" in markdown and "`model." not in markdown
    assert "35,746,307 parameters" in markdown


def test_a_score_by_the_papers_protocol_is_called_comparable_and_a_bound_above_the_lines_not_yet_useful(make):
    run = make("cifar10")
    change_scores(run, protocol={"comparable": True, "why_not": []})
    assert "Not comparable" in write(run)[1], "an older version did not look at the pixels"
    change_scores(run, protocol={"official_data": True})
    html, markdown = write(run)
    assert "by the paper's protocol" in markdown and "<strong>comparable</strong></td>" in html
    assert "not comparable" not in html.lower()
    for rate, rmse, variance, useful in (
        (2.4527, 1.1034, "fixedlarge", True), (2.4528, 1.1034, "fixedlarge", False),
        (9.0, 1.1034, "fixedsmall", True),  # its rate has another line
        (1.0, 1.1036, "fixedsmall", False), (2.4527, 1.1035, "fixedlarge", False),
    ):  # fmt: skip
        change_scores(run, scores={"rate_bpd": rate, "rmse": rmse}, protocol={"nll_variance": variance})
        assert (compare_with_linear_denoiser(RunFiles(run)) == "") is useful
    assert "<blockquote>\n<p><strong>Not yet useful</strong>" in write(run)[0]


def test_it_is_remade_exactly_when_something_it_shows_changes(make):
    run = make()
    assert not report.STAGE.is_done(run)
    first = write(run)
    assert report.STAGE.is_done(run) and write(run) == first
    run.log.touch()
    rundir.write_json(run.timings_json, {"report": 2.0})  # its own time is none of its inputs
    assert report.STAGE.is_done(run)
    for change in (
        lambda: rundir.write_json(run.commits_json, {"train": ["a1"]}),
        lambda: write_grid(run.locate_grid(100), run.experiment),
        lambda: rundir.write_json(run.timings_json, {"train": 9.0}),
        lambda: run.log.write_text(run.log.read_text().replace('"step": 1200', '"step": 1600')),
        lambda: shutil.rmtree(run.scores),
        lambda: run.report_html.write_text("half"),
    ):
        change()
        assert not report.STAGE.is_done(run)
        write(run)
        assert report.STAGE.is_done(run)


def test_what_is_absent_is_left_out_with_the_command_that_makes_it(make):
    run = make()
    parts = {"figures": "figures", "evaluation": "evaluate", "samples": "sample", "log.jsonl": "train"}
    for gone, stage in parts.items():
        place = run.path / gone
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        html, markdown = write(run)
        assert f"`ddpm {stage} digits`" in markdown and f"ddpm {stage} digits" in html
    shutil.rmtree(run.path)
    shutil.rmtree(run.data)
    markdown = write(run)[1]
    assert "> Not trained yet." in markdown and "`ddpm shard digits`" in markdown


BOUND = {"nll_bpd": 4.5, "rate_bpd": 2.0, "distortion_bpd": 2.5}
MORE = {
    "fid_test": 16.3, "is_shuffled_mean": 8.9, "is_shuffled_std": 0.1, "kid_mean": 0.00432, "recall": 0.42,
}  # fmt: skip
ERRORS = BOUND | {
    "fid": 14.213, "fid_se": 1.31, "nll_bpd": 4.5214, "nll_bpd_se": 0.0421, "rate_bpd": 2.0214, "rate_bpd_se": 0.113,
    "kid_mean": 0.0971, "kid_mean_se": 0.1402, "recall": 0.5, "recall_se": None, "recall_se_reason": "a single unit",
}  # fmt: skip
POINTS = {"test": {"fid": 31.0, "fid_se": 2.02, "n": 360}, "samples": {"fid": 17.2, "fid_se": 1.4, "n": 360}}
DEFICIENT = "rank-deficient: n = 32 is not above 64"


@pytest.mark.parametrize(("name", "scores", "more", "present", "absent"), [
    ("digits", {"fid": 20.0}, {"reference_points": {}}, ["| FID | 20.00 |"], "| NLL"),
    ("cifar10", BOUND, {"protocol": {}, "reference_points": {}}, ["NLL ≤ 4.500 bits/dim"], "Not yet useful"),
    ("digits", {"fid": 192.8}, {"protocol": {"why_not": [DEFICIENT]}}, ["(test images 31.00", f"**{DEFICIENT}**"],
     "| NLL"),
    ("digits", MORE, {}, ["| FID, test set | 16.30 |", "| IS, shuffled, spread of its splits | 0.10 |",
                          "| KID | 0.00432 |", "| recall | 0.420 |"], "Not yet useful"),
    ("digits", ERRORS, {"reference_points": POINTS},
     ["FID 14.2 ± 1.3 (at n = 360: this run 17.2 ± 1.4, test images 31.0 ± 2.0)",
      "|  | **This run** | This run, equal n | Test images |", "| KID | 0.10 ± 0.14 |",
      "**NLL ≤ 4.521 ± 0.042 bits/dim** = rate 2.02 ± 0.11 ", "no error: a single unit."], "Not yet useful"),
])  # fmt: skip
def test_the_scores_that_are_there_are_shown(make, name, scores, more, present, absent):
    run = make(name)
    write_scores(run.scores, run.experiment, scores=scores, **more)
    markdown = write(run)[1]
    assert all(text in markdown for text in present) and absent not in markdown


def test_text_is_escaped_links_are_of_the_web_or_relative_and_pictures_of_the_page(tmp_path):
    html = convert_to_html("# a<b>\n\nx & `c<d>` **s** <i>\n\n## <u>\n\n[x](javascript:alert(1))", tmp_path)
    assert "a&lt;b&gt;" in html and "x &amp; <code>c&lt;d&gt;</code> <strong>s</strong> &lt;i&gt;" in html
    assert "<u>" not in html
    kept = ["http://a.b/c:d", "https://a", "report.html", "a/b:c", "#part", "../x?y"]
    others = ["javascript:x", "JavaScript:x", "&#106;avascript:x", "data:x", "file:x", "//a.b", "ftp://a"]
    others += ["mailto:a@b", "file:///etc/passwd", "ms-msdt:/id"]
    for link in kept + others:
        html = convert_to_html(f"# a\n\n[x]({link}) <{link}>", tmp_path)
        assert ("href=" in html) == (link in kept), link
    (tmp_path / "page").mkdir()
    for name in ("page/in.svg", "out.svg", "page/in.txt"):
        (tmp_path / name).write_text("<svg/>")
    names = ("in.svg", "../out.svg", "in.txt", str(tmp_path / "out.svg"), "absent.svg")
    text = "# Title\n\n" + "\n\n".join(f"![*{name}* & words]({name})" for name in names)
    html = convert_to_html(text, tmp_path / "page")
    assert re.findall(r'<img .*alt="(.*?)"', html) == ["in.svg &amp; words"]
    assert html.count(" &amp; words") == len(names) and html.count("<figure>") == 1


def test_the_papers_recipe_and_rows_are_those_of_the_configurations(tmp_path):
    files = [f for f in (ROOT / "conf").glob("cifar10_*.yaml") if re.match("# Tables? [12]", f.read_text())]
    assert len(files) == 5, "all but L_simple itself"
    for file in files:
        comments = "".join(line for line in file.open() if line.startswith("#"))
        experiment = config.load_experiment(str(file), [])
        row, text = paper.find_paper_row(experiment.diffusion), comments.replace("+-", "±").replace("<=", "≤")
        printed = [row.scores[key] for key in ("fid", "is_mean", "nll_bpd") if key in row.scores]
        assert all(number in text for number in printed) and bool(printed) != ("FID -" in text), file.name
    cifar10 = config.to_dict(config.load_experiment("cifar10", []))
    for section, recipe in paper.RECIPE.items():
        assert recipe == {key: cifar10[section][key] for key in recipe}
    assert len({id(row) for row in paper.TABLES_1_AND_2.values()}) == 6
    assert paper.find_paper_row(config.load_experiment("cifar10_cosine_hybrid", []).diffusion) is None
    np.save(tmp_path / "betas.npy", np.full(1000, 0.01))
    own = config.load_experiment("cifar10", [f"diffusion.betas={tmp_path / 'betas.npy'}"])
    assert not paper.has_paper_schedule(own.diffusion)
    differences = list_differences_from_paper(SimpleNamespace(experiment=own))
    assert differences == ["`diffusion.betas` is 1,000 values, not []"]


def test_a_run_stands_below_the_row_of_its_objective_if_there_is_one(make):
    markdown = write(make("cifar10_vlb_mean_fixed"))[1]
    row = "| μ̃, L, fixed isotropic Σ | 13.22 | – | 8.06 ± 0.09 | – |\n| **this run** | 14.21 |"
    assert row in markdown and markdown.count("| **this run** | 14.21") == 1
    run = make("cifar10_cosine_hybrid")
    change_scores(run, scores={"rate_bpd": 9.0, "rmse": 9.0})
    markdown = write(run)[1]
    assert "**The paper has no row for this objective.**" in markdown and "difference" not in markdown
    assert "**Other settings than the paper's**: `diffusion.timesteps` is 4,000, not 1,000" in markdown
    assert "0.95136" not in markdown, "Table 4 is of another chain"
    assert "Not yet useful" not in markdown, "and so is the linear denoiser"


def test_checkpoints_are_drawn_with_the_published_scores(make):
    run = make("cifar10", "evaluate.checkpoints=every:10000", "sample.batch_size=500")
    assert "The checkpoints are not scored yet" in write(run)[1]
    steps = ((10_000, 17.25), (20_000, 16.5))
    scores = [{"step": step, "fid": fid, "fid_se": 0.31, "evaluation": "-"} for step, fid in steps]
    del scores[0]["fid_se"]  # as earlier files
    content = {"metric": "fid", "n": 5000, "weights": "ema", "extractor": "inception", "reference": "train"}
    rundir.write_json(run.selection_json, content | {"best": 20_000, "scores": scores})
    rundir.write_manifest(run.selection, ["selection.json"])
    assert not report.STAGE.is_done(run), "a selection is something it shows"
    markdown = write(run)[1]
    assert "**Step 20,000 has the best FID, 16.50 ± 0.31**, of 2 checkpoints" in markdown
    rows = ("10,000 | 17.25 | –", "**20,000** | 16.50 ± 0.31 | –", "46,800 | – | 9.16", "796,000 | – | 3.19")
    for row in rows:
        assert f"| {row} |" in markdown

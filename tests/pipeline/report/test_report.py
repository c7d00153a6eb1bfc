"""The report from synthetic run directories: what stands in it, what it leaves out, and when it is remade."""

from __future__ import annotations

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from synthetic_run import make_run, write_grid, write_scores

from pipeline import config
from pipeline.drawing import charts
from pipeline.drawing.style import COLOURS
from pipeline.report import paper, pictures
from pipeline.report.html import to_html
from pipeline.stages import report
from pipeline.store import files as rundir

ROOT = Path(__file__).parents[3]
CIFAR10 = ("train.steps=20000", "train.sample_every=10000", "train.checkpoint_every=10000")


def write(experiment, run) -> tuple[str, str]:
    """(HTML, Markdown), remade."""
    assert list(report.STAGE.work(run.of(experiment))) == []
    return (run.report / "report.html").read_text(), (run.report / "report.md").read_text()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    experiment, run = make_run(tmp_path_factory.mktemp("storage"))
    rundir.write_json(run.timings_json, {"train": 130.0, "report": 2.0})
    return experiment, run, *write(experiment, run)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    experiment, run = make_run(tmp_path_factory.mktemp("storage"), "cifar10", CIFAR10)
    return experiment, run, *write(experiment, run)


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take most of the time, and only some tests look at them."""

    monkeypatch.setattr(charts, "save_panels", lambda panels, file: file.write_text("<svg></svg>"))


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_page_fetches_nothing_and_runs_nothing(digits):
    elements = Elements(digits[2]).tags
    assert not {"script", "link", "iframe", "svg"} & {tag for tag, _ in elements}
    places = [a[key] for _, a in elements for key in ("src", "href", "xlink:href") if a.get(key)]
    assert places and all(re.match(r"data:image/(png|svg\+xml);base64,|#", place) for place in places)
    assert "@import" not in digits[2] and not re.search(r"url\((?!#)", digits[2])
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_plots_follow_the_theme(digits):
    plots = [
        base64.b64decode(a["src"].partition(",")[2]).decode()
        for tag, a in Elements(digits[2]).tags
        if tag == "img" and a["class"] == "svg" and a["alt"]
    ]
    assert len(plots) >= 12
    for plot in plots:
        drawn, dark = plot.partition("</style>")[2], plot.partition("prefers-color-scheme: dark")[2]
        used = {colour.lower() for colour in re.findall(r"(?:fill|stroke): (#\w+)", drawn)}
        assert used <= {light for light, _ in COLOURS.values()} and COLOURS["run"][0] in used
        for light, other in COLOURS.values():
            assert f'[style*="fill: {light}"] {{fill: {other} !important}}' in dark


def test_the_markdown_twin_has_its_pictures_beside_it(digits):
    _, run, html, markdown = digits
    names = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(names) >= 14 and len(names) == len(set(names))
    assert all((run.report / name).stat().st_size > 0 for name in names)
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert headings == re.findall(r"<h2>(.*?)</h2>", html)
    assert set(rundir.read_manifest(run.report, "sha256")["files"]) == {"report.html", "report.md", *names}


def test_the_verdict_comes_first(digits, cifar10):
    said = "After 1,200 training steps: FID 14.21 (15% of a Gaussian's 96.4), IS 9.02 ± 0.21, NLL ≤ 4.520 bits/dim."
    assert f"> {said}\n" in digits[3].replace("\u00a0", " ")
    assert "Not comparable with the paper's row, for the reasons below.\n" in cifar10[3]


def test_cifar10_stands_beside_the_paper(cifar10):
    markdown = cifar10[3].replace("\u00a0", " ")
    rows = [
        "| ε, L_simple | 3.17 | 5.24 | 9.46 ± 0.11 | ≤ 3.75 |",
        "| **this run** | 14.21 | – | 9.02 ± 0.21 | ≤ 4.520 |",
        "| *difference, across protocols* | +11.04 | – | −0.44 | +0.77 |",
    ]
    assert "\n".join(rows) in markdown, "this run stands below its own row"
    assert "| μ̃, L, learned diagonal Σ | 23.69 | – | 7.28 ± 0.10 | – |" in markdown
    assert "| ε, L, fixed isotropic Σ | 13.51 | – | 7.67 ± 0.13 | ≤ 3.70 |" in markdown
    assert "**Not comparable with the paper**: n = 512 images" in markdown
    found = re.search(r"\| 1,000 \| (\S+) \| 1.77581 \| (\S+) \| (\S+) \| 0.95136 \| (\S+) \|", markdown)
    rate, off, rmse, off_rmse = (float(number.replace("−", "-")) for number in found.groups())
    assert (rate - 1.77581, rmse - 0.95136) == pytest.approx((off, off_rmse), abs=1.1e-5)
    assert len(re.findall(r"^\| [\d,]*00 \|", markdown, re.MULTILINE)) == 10
    assert "`train.steps` is 20,000, not 800,000" in markdown and "`model." not in markdown
    assert "35,746,307 parameters" in markdown


def test_other_images_stand_beside_reference_points_only(digits):
    markdown = digits[3].replace("\u00a0", " ")
    assert "Table 1" not in markdown and "paper 3.17" not in markdown and "not comparable" not in markdown
    assert "The paper has no row for these images" in markdown
    rows = [
        "|  | **This run** | Test images | Gaussian | Noise |",
        "| FID | 14.21 | 31.00 | 96.40 | 2,288.00 |",
        "| IS | 9.02 ± 0.21 | 9.30 ± 0.30 | 3.10 | 1.20 |",
        "| NLL, bits/dim | ≤ 4.520 | – | – | – |",
        "| Images | 512 | 360 | 512 | 512 |",
    ]
    assert all(row in markdown for row in rows)
    assert "8.0% to 13.0% of the samples" in markdown


def test_a_score_by_the_papers_protocol_is_called_comparable(tmp_path, undrawn):
    experiment, run = make_run(tmp_path, "cifar10", CIFAR10)
    folder = run.of(experiment).scores
    protocol = rundir.read_json(folder / "metrics.json")["protocol"] | {"comparable": True, "why_not": []}
    write_scores(folder, experiment, protocol=protocol)
    html, markdown = write(experiment, run)
    assert "by the paper's protocol" in markdown and "<strong>comparable</strong></td>" in html
    assert "not comparable" not in html.lower()


def test_every_score_has_its_protocol(digits):
    for row in (
        "Images scored | 512",
        "Weights | ema",
        "Feature extractor | classifier-0a1b2c3d",
        "Decoder | tanh",
    ):
        assert f"| {row} |" in digits[3]


def test_every_figure_in_the_manifest_is_shown_with_its_caption(tmp_path, undrawn):
    experiment, run = make_run(tmp_path)
    folder = run.of(experiment).figures
    for name in ("scores_along.svg", "rate_distortion.svg"):
        (folder / name).write_text(f"<svg><text>{name}</text></svg>")
    order = ["samples.png", "scores_along.svg", "rate_distortion.svg", "progressive.png"]
    captions = {name: f"What {name} shows" for name in order}
    left_out = {"nearest_features": "it needs features"}
    rundir.write_manifest(folder, order, order=order, captions=captions, skipped=left_out)
    html, markdown = write(experiment, run)
    for name in order:
        assert f"![What {name} shows]({name})" in markdown and f"<figcaption>What {name} shows<" in html
    places = [markdown.index(f"({name})") for name in ("samples.png", "scores_along.svg", "progressive.png")]
    assert places == sorted(places)
    assert "Not drawn: `nearest_features`, because it needs features." in markdown
    section = markdown[markdown.index("## Rate and distortion") :]
    assert "(rate_distortion.svg)" in section and "(rd.svg)" not in section, "once is enough"


def test_what_was_run_is_said(digits):
    markdown = digits[3]
    assert "`0123456789abcdef0123456789abcdef01234567`" in markdown and "torch 2.9, ray 2.50" in markdown
    assert "| Time | train 2 min 10 s |" in markdown
    assert "beta_schedule: linear" in markdown


def test_the_full_training_is_projected_from_the_measured_rate(cifar10):
    found = re.search(r"\| Training \| ([\d.]+) steps/s \| 800,000 steps \| (\d+) h \d\d min \|", cifar10[3])
    assert found and "projected from the measured rates" in cifar10[3]
    rate, hours = float(found[1]), int(found[2])
    assert rate == pytest.approx(1500 / 128, rel=0.02) and hours == pytest.approx(
        800_000 / rate / 3600, abs=1
    )


def test_it_is_remade_exactly_when_something_it_shows_changes(tmp_path, undrawn):
    experiment, run = make_run(tmp_path)
    assert not report.STAGE.is_done(run.of(experiment))
    first = write(experiment, run)
    assert report.STAGE.is_done(run.of(experiment))
    assert write(experiment, run) == first
    run.log.touch()
    rundir.write_json(run.timings_json, {"report": 2.0})  # its own time is none of its inputs
    assert report.STAGE.is_done(run.of(experiment))
    changes = [
        lambda: rundir.write_json(run.commits_json, {"train": ["a1"]}),
        lambda: write_grid(run.grids / "00000100.png", experiment),
        lambda: rundir.write_json(run.timings_json, {"train": 9.0}),
        lambda: run.log.write_text(run.log.read_text().replace('"step": 1200', '"step": 1600')),
        lambda: shutil.rmtree(run.of(experiment).scores),
        lambda: (run.report / "report.html").write_text("half"),
    ]
    for change in changes:
        change()
        assert not report.STAGE.is_done(run.of(experiment))
        write(experiment, run)
        assert report.STAGE.is_done(run.of(experiment))


def test_commits_are_named_by_stage_where_they_differ(tmp_path, undrawn):
    experiment, run = make_run(tmp_path)
    for commits, said in (
        ({"train": ["a1"], "evaluate": ["a1"], "report": ["c3"]}, "`a1`"),
        (
            {"shard": ["a1"], "train": ["a1", "b2"], "evaluate": ["b2"]},
            "shard, train `a1` · train, evaluate `b2`",
        ),
    ):
        rundir.write_json(run.commits_json, commits)
        assert f"| Commit | {said} |" in write(experiment, run)[1]


@pytest.mark.parametrize(
    ("gone", "stage"),
    [("samples", "sample"), ("evaluation", "evaluate"), ("figures", "figures"), ("log.jsonl", "train")],
)
def test_what_is_absent_is_left_out_with_the_command_that_makes_it(tmp_path, undrawn, gone, stage):
    experiment, run = make_run(tmp_path)
    place = run.path / gone
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    html, markdown = write(experiment, run)
    assert f"`ddpm {stage} digits`" in markdown and f"ddpm {stage} digits" in html


def test_a_run_of_which_nothing_is_there_has_a_report(tmp_path, undrawn):
    experiment, run = make_run(tmp_path, scores=False)
    shutil.rmtree(run.path)
    shutil.rmtree(run.data)
    _, markdown = write(experiment, run)
    assert "> Not trained yet." in markdown and "`ddpm shard digits`" in markdown


def test_scores_without_the_nll_leave_it_out(tmp_path, undrawn):
    experiment, run = make_run(tmp_path)
    folder = run.of(experiment).scores
    write_scores(folder, experiment, scores={"fid": 20.0}, reference_points={})
    (folder / "nll.json").unlink()
    _, markdown = write(experiment, run)
    assert (
        "| FID | 20.00 |" in markdown and "| NLL" not in markdown and "## Rate and distortion" not in markdown
    )


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_bound_alone_needs_no_protocol_of_images(tmp_path, undrawn, name):
    experiment, run = make_run(tmp_path, name)
    scores = {"nll_bpd": 4.5, "rate_bpd": 2.0, "distortion_bpd": 2.5}
    write_scores(run.of(experiment).scores, experiment, scores=scores, protocol={}, reference_points={})
    assert "NLL ≤ 4.500 bits/dim" in write(experiment, run)[1].replace("\u00a0", " ")


def test_bad_scores_are_called_what_they_are(tmp_path, undrawn):
    experiment, run = make_run(tmp_path)
    folder = run.of(experiment).scores
    protocol = rundir.read_json(folder / "metrics.json")["protocol"]
    protocol["why_not"] = ["rank-deficient: n = 32 is not above 64 features"]
    write_scores(folder, experiment, scores={"fid": 192.8}, protocol=protocol)
    _, markdown = write(experiment, run)
    assert "(2.0 times a Gaussian's 96.4)" in markdown
    assert "**rank-deficient: n = 32 is not above 64 features**" in markdown


def test_text_is_escaped(tmp_path):
    html = to_html("# a<b>\n\nx & `c<d>` **s** <i>\n\n## <u>\n\n[x](javascript:alert(1))", tmp_path)
    assert "a&lt;b&gt;" in html and "x &amp; <code>c&lt;d&gt;</code> <strong>s</strong> &lt;i&gt;" in html
    assert "<u>" not in html and 'href="javascript' not in html


def test_only_pictures_of_the_page_are_put_into_it(tmp_path):
    (tmp_path / "page").mkdir()
    for name in ("page/in.svg", "out.svg", "page/in.txt"):
        (tmp_path / name).write_text("<svg/>")
    names = ("in.svg", "../out.svg", "in.txt", str(tmp_path / "out.svg"), "absent.svg")
    html = to_html(
        "# Title\n\n" + "\n\n".join(f"![*{name}* & words]({name})" for name in names), tmp_path / "page"
    )
    assert re.findall(r'<img .*alt="(.*?)"', html) == ["in.svg &amp; words"]
    assert html.count(" &amp; words") == len(names) and html.count("<figure>") == 1


def test_small_pictures_are_enlarged_pixel_by_pixel(tmp_path):
    (tmp_path / "page").mkdir()
    Image.new("L", (300, 20), 7).save(tmp_path / "small.png")
    picture = pictures.copy(tmp_path / "small.png", tmp_path / "page", "")
    with Image.open(tmp_path / "page" / picture.name) as image:
        assert image.size == (1200, 80) and image.getextrema() == (7, 7)


# Beside the paper


def change_scores(experiment, run, **changed) -> None:
    """Overwrite parts of metrics.json: scores and protocol are added to, all else replaced."""
    file = run.of(experiment).metrics_json
    metrics = rundir.read_json(file)
    parts = {name: metrics[name] | changed.pop(name, {}) for name in ("scores", "protocol")}
    rundir.write_json(file, metrics | parts | changed)


def test_the_papers_recipe_and_rows_are_those_of_the_configurations():
    files = [f for f in (ROOT / "conf").glob("cifar10_*.yaml") if re.match("# Tables? [12]", f.read_text())]
    assert len(files) == 5, "all but L_simple itself"
    for file in files:
        comments = "".join(line for line in file.open() if line.startswith("#"))
        experiment = config.load_experiment(str(file), [])
        row, text = paper.find_row(experiment.diffusion), comments.replace("+-", "±").replace("<=", "≤")
        printed = [row.scores[key] for key in ("fid", "is_mean", "nll_bpd") if key in row.scores]
        assert all(number in text for number in printed) and bool(printed) != ("FID -" in text), file.name
    cifar10 = config.to_dict(config.load_experiment("cifar10", []))
    for section, recipe in paper.RECIPE.items():
        assert recipe == {key: cifar10[section][key] for key in recipe}
    assert len({id(row) for row in paper.TABLES_1_AND_2}) == 6
    assert paper.find_row(config.load_experiment("cifar10_cosine_hybrid", []).diffusion) is None


def test_a_run_stands_below_the_row_of_its_objective(tmp_path, undrawn):
    experiment, run = make_run(tmp_path, "cifar10_vlb_mean_fixed", CIFAR10)
    markdown = write(experiment, run)[1].replace("\u00a0", " ")
    row = "| μ̃, L, fixed isotropic Σ | 13.22 | – | 8.06 ± 0.09 | – |\n| **this run** | 14.21 |"
    assert row in markdown and markdown.count("| **this run** | 14.21") == 1


def test_an_objective_without_a_row_is_said_to_have_none(tmp_path, undrawn):
    experiment, run = make_run(tmp_path, "cifar10_cosine", CIFAR10)
    change_scores(experiment, run, scores={"rate_bpd": 9.0, "rmse": 9.0})
    markdown = write(experiment, run)[1]
    assert "**Trained otherwise than in the paper**: `diffusion.timesteps` is 4,000, not 1,000" in markdown
    assert "0.95136" not in markdown, "Table 4 is of another chain"
    assert "Not yet useful" not in markdown, "and so is the line"
    experiment, run = make_run(tmp_path, "cifar10_cosine_hybrid", CIFAR10)
    markdown = write(experiment, run)[1]
    assert "**The paper has no row for this objective.**" in markdown and "difference" not in markdown


@pytest.mark.parametrize(
    ("rate", "rmse", "variance", "useful"),
    [
        (2.4527, 1.1034, "fixedlarge", True),
        (2.4528, 1.1034, "fixedlarge", False),
        (2.4527, 1.1035, "fixedlarge", False),
        (9.0, 1.1034, "fixedsmall", True),  # its rate has another line
        (1.0, 1.1036, "fixedsmall", False),
    ],
)
def test_a_network_that_does_not_beat_the_linear_denoiser_is_not_yet_useful(
    tmp_path, undrawn, rate, rmse, variance, useful
):
    experiment, run = make_run(tmp_path, "cifar10", CIFAR10)
    change_scores(
        experiment, run, scores={"rate_bpd": rate, "rmse": rmse}, protocol={"nll_variance": variance}
    )
    html, markdown = write(experiment, run)
    assert ("\n> **Not yet useful**: the best linear denoiser" in markdown) is not useful
    assert ("<blockquote>\n<p><strong>Not yet useful</strong>" in html) is not useful


def test_digits_are_not_held_against_the_linear_denoiser_of_cifar10(tmp_path, undrawn):
    experiment, run = make_run(tmp_path)
    change_scores(experiment, run, scores={"rate_bpd": 9.0, "rmse": 9.0})
    assert "Not yet useful" not in write(experiment, run)[1]


def test_every_score_that_is_there_is_shown(tmp_path, undrawn):
    experiment, run = make_run(tmp_path)
    more = {
        "fid_test": 16.3,
        "is_shuffled_mean": 8.9,
        "is_shuffled_std": 0.1,
        "kid_mean": 0.00432,
        "kid_std": 0.0004,
    }
    change_scores(experiment, run, scores={**more, "precision": 0.61, "recall": 0.42})
    markdown = write(experiment, run)[1].replace("\u00a0", " ")
    for row in (
        "FID, test set | 16.30",
        "IS, shuffled | 8.90 ± 0.10",
        "KID | 0.00432 ± 0.00040",
        "precision | 0.610",
    ):
        assert f"| {row} | – |" in markdown
    assert "| recall | 0.420 |" in markdown


CHOOSING = ("evaluate.checkpoints=every:10000", "sample.batch_size=500")


def choose(experiment, run) -> None:
    scores = [
        {"step": step, "fid": fid, "evaluation": "-"} for step, fid in ((10_000, 17.25), (20_000, 16.5))
    ]
    content = {"metric": "fid", "n": 5000, "weights": "ema", "extractor": "inception", "reference": "train"}
    rundir.write_json(run.of(experiment).selection_json, content | {"best": 20_000, "scores": scores})


def test_checkpoints_stand_beside_the_published_ladder(tmp_path, undrawn):
    experiment, run = make_run(tmp_path, "cifar10", (*CIFAR10, *CHOOSING))
    assert "The checkpoints are not scored yet" in write(experiment, run)[1]
    choose(experiment, run)
    assert not report.STAGE.is_done(run.of(experiment)), "a selection is something it shows"
    markdown = write(experiment, run)[1]
    assert (
        "**Step 20,000 has the best FID, 16.50**, of 2 checkpoints, each scored on 5,000 samples" in markdown
    )
    for row in ("10,000 | 17.25 | –", "**20,000** | 16.50 | –", "46,800 | – | 9.16", "796,000 | – | 3.19"):
        assert f"| {row} |" in markdown


def test_other_images_have_no_published_ladder(tmp_path, undrawn):
    experiment, run = make_run(tmp_path, "digits", ("evaluate.checkpoints=every:200",))
    choose(experiment, run)
    section = write(experiment, run)[1].split("## Checkpoints")[1].split("\n## ")[0]
    assert "| **20,000** | 16.50 |" in section and "published" not in section


def test_sampling_and_bound_are_projected_from_what_they_took(tmp_path, undrawn):
    experiment, run = make_run(tmp_path, "cifar10", CIFAR10)
    chains = {"50": {"images": 10, "seconds": 99.0}, "250": {"images": 500, "seconds": 1000.0}}
    rundir.write_json(run.spent_json, {"samples": chains, "NLL": {"250": {"images": 100, "seconds": 360.0}}})
    markdown = write(experiment, run)[1]
    # 2 s an image of 250 steps, so 8 s of 1,000: 50,000 take 111 h 6 min.
    assert (
        "| Sampling | 0.50 images/s of 250 steps | 50,000 images of 1,000 steps | 111 h 06 min |" in markdown
    )
    assert "| NLL bound | 0.28 images/s | 10,000 images | 10 h 00 min |" in markdown
    assert "no price is assumed" in markdown

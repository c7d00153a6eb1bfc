"""The report from synthetic run directories: what stands in it, what it leaves out, and when it is remade."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image
from synthetic_run import make_run, write_grid, write_scores

from pipeline import config, report, rundir
from pipeline.report import page, pictures
from pipeline.report.style import COLOURS
from pipeline.report.web import to_html

CIFAR10 = ("train.steps=20000", "train.sample_every=10000", "train.checkpoint_every=10000")


def write(experiment, run) -> tuple[str, str]:
    """(HTML, Markdown), remade."""
    assert list(report.work(experiment, run)) == []
    return (run.report / "report.html").read_text(), (run.report / "report.md").read_text()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    experiment, run = make_run(tmp_path_factory.mktemp("storage"))
    rundir.write_json(run.path / "timings.json", {"train": 130.0, "report": 2.0})
    return experiment, run, *write(experiment, run)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    experiment, run = make_run(tmp_path_factory.mktemp("storage"), "cifar10", CIFAR10)
    return experiment, run, *write(experiment, run)


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take most of the time, and only some tests look at them."""

    def picture(name, title, x, caption, draw, size=None):
        return page.Picture(f"{name}.svg", b"<svg></svg>", caption)

    monkeypatch.setattr("pipeline.report.plots._picture", picture)


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_page_fetches_nothing_and_runs_nothing(digits):
    elements = Elements(digits[2]).tags
    assert not {"script", "link", "iframe"} & {tag for tag, _ in elements}
    places = [a[key] for _, a in elements for key in ("src", "href", "xlink:href") if a.get(key)]
    assert places and all(place.startswith(("data:image/png;base64,", "#")) for place in places)
    assert "@import" not in digits[2] and not re.search(r"url\((?!#)", digits[2])


def test_every_reference_inside_a_plot_is_to_that_plot(digits):
    ids = [attributes["id"] for _, attributes in Elements(digits[2]).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", digits[2])) <= set(ids)


def test_plots_follow_the_theme(digits):
    plots = re.findall(r"<svg.*?</svg>", digits[2], re.DOTALL)
    assert len(plots) >= 12
    for plot in plots:
        assert "var(--run)" in plot and not any(light in plot for light, _ in COLOURS.values())


def test_the_markdown_twin_has_its_pictures_beside_it(digits):
    _, run, html, markdown = digits
    names = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(names) >= 14 and len(names) == len(set(names))
    assert all((run.report / name).stat().st_size > 0 for name in names)
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert headings == re.findall(r"<h2>(.*?)</h2>", html)
    assert set(rundir.read_manifest(run.report, "sha256")["files"]) == {"report.html", "report.md", *names}


def test_the_verdict_comes_first(digits, cifar10):
    said = "After 1,200 training steps: FID 14.21 (15% of a Gaussian's 96.4), IS 9.02 ± 0.21, NLL ≤ 4.52 bits/dim."
    assert f"> {said}\n" in digits[3].replace("\u00a0", " ")
    assert "Not comparable with the paper's row, for the reasons below.\n" in cifar10[3]


def test_cifar10_stands_beside_the_paper(cifar10):
    markdown = cifar10[3].replace("\u00a0", " ")
    rows = [
        "| ε, L_simple | 3.17 | 5.24 | 9.46 ± 0.11 | ≤ 3.75 |",
        "| this run | 14.21 | – | 9.02 ± 0.21 | ≤ 4.52 |",
        "| difference, across protocols | +11.04 | – | −0.44 | +0.77 |",
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
        "|  | This run | Test images | Gaussian | Noise |",
        "| FID | 14.21 | 31.00 | 96.40 | 2,288.00 |",
        "| IS | 9.02 ± 0.21 | 9.30 ± 0.30 | 3.10 | 1.20 |",
        "| NLL, bits/dim | ≤ 4.52 | – | – | – |",
        "| Images | 512 | 360 | 512 | 512 |",
    ]
    assert all(row in markdown for row in rows)
    assert "8.0% to 13.0% of the samples" in markdown


def test_a_score_by_the_papers_protocol_is_called_comparable(tmp_path, undrawn):
    experiment, run = make_run(tmp_path, "cifar10", CIFAR10)
    folder = run.evaluation(config.evaluate_key(experiment, run.run_key))
    protocol = rundir.read_json(folder / "metrics.json")["protocol"] | {"comparable": True, "why_not": []}
    write_scores(folder, experiment, protocol=protocol)
    html, markdown = write(experiment, run)
    assert "by the paper's protocol" in markdown and "class='badge good'>comparable<" in html
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
    folder = run.figures(config.figures_key(experiment, run.run_key))
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
    assert not report.is_done(experiment, run)
    first = write(experiment, run)
    assert report.is_done(experiment, run)
    assert write(experiment, run) == first
    run.log.touch()
    rundir.write_json(run.path / "timings.json", {"report": 2.0})  # its own time is none of its inputs
    assert report.is_done(experiment, run)
    changes = [
        lambda: write_grid(run.grids / "00000100.png", experiment),
        lambda: rundir.write_json(run.path / "timings.json", {"train": 9.0}),
        lambda: run.log.write_text(run.log.read_text().replace('"step": 1200', '"step": 1600')),
        lambda: shutil.rmtree(run.evaluation(config.evaluate_key(experiment, run.run_key))),
        lambda: (run.report / "report.html").write_text("half"),
    ]
    for change in changes:
        change()
        assert not report.is_done(experiment, run)
        write(experiment, run)
        assert report.is_done(experiment, run)


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
    folder = run.evaluation(config.evaluate_key(experiment, run.run_key))
    write_scores(folder, experiment, scores={"fid": 20.0}, reference_points={})
    (folder / "nll.json").unlink()
    _, markdown = write(experiment, run)
    assert (
        "| FID | 20.00 |" in markdown and "| NLL" not in markdown and "## Rate and distortion" not in markdown
    )


def test_bad_scores_are_called_what_they_are(tmp_path, undrawn):
    experiment, run = make_run(tmp_path)
    folder = run.evaluation(config.evaluate_key(experiment, run.run_key))
    protocol = rundir.read_json(folder / "metrics.json")["protocol"]
    protocol["why_not"] = ["rank-deficient: n = 32 is not above 64 features"]
    write_scores(folder, experiment, scores={"fid": 192.8}, protocol=protocol)
    _, markdown = write(experiment, run)
    assert "(2.0 times a Gaussian's 96.4)" in markdown
    assert "**rank-deficient: n = 32 is not above 64 features**" in markdown


def test_text_is_escaped():
    made = page.Page("a<b>", "", "x & `c<d>` **s**", [], [])
    html = to_html(made)
    assert "a&lt;b&gt;" in html and "x &amp; <code>c&lt;d&gt;</code> <strong>s</strong>" in html


def test_small_pictures_are_enlarged_pixel_by_pixel(tmp_path):
    Image.new("L", (300, 20), 7).save(tmp_path / "small.png")
    with Image.open(BytesIO(pictures.enlarged(tmp_path / "small.png"))) as image:
        assert image.size == (1200, 80) and image.getextrema() == (7, 7)

"""Pages as a person sees them: a real Chromium, each page in a frame of a given width."""

import json
import re
import shutil
import subprocess

import pytest
from synthetic_run import make_run

from pipeline.report.compared_run import make_compared_runs
from pipeline.report.comparison import write_comparison
from pipeline.stages import report

QUIET = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-sync --hide-scrollbars"
# The frame's page may be read, and what it complains of is written to stderr.
OPEN = "--allow-file-access-from-files --enable-logging=stderr --virtual-time-budget=9000 --window-size=1400,1000"
FRAME = """
<iframe src="{page}" width="{width}" height="844" style="border: 0"></iframe>
<script>
onload = () => {{
  const page = document.querySelector('iframe').contentWindow, root = page.document.documentElement;
  const style = node => page.getComputedStyle(node), box = node => node.getBoundingClientRect();
  const inside = node => node && (style(node).overflowX !== 'visible' || inside(node.parentElement));
  const list = (nodes, holds) =>
    [...page.document.querySelectorAll(nodes)].filter(holds).map(node => node.outerHTML.slice(0, 120));
  const found = {{
    // Wider than the window although no box around it scrolls.
    'sticking out': list('body *', node => box(node).right > page.innerWidth + 1 && !inside(node.parentElement)),
    'numbers wider than their card': list('header td', node => node.scrollWidth > node.clientWidth + 1),
    // The pictures, the verdict and the cards are seen without scrolling.
    'below': list('header img, header blockquote, header .scroll:first-of-type tr', node => box(node).bottom > 844),
    'not loaded': list('img', image => !image.naturalWidth),
    'size': [page.innerWidth, root.scrollWidth, root.scrollHeight < 6 * 844],
    'dark': page.matchMedia('(prefers-color-scheme: dark)').matches,
    'colour': style(root).backgroundColor,
  }};
  document.body.innerHTML = '<pre></pre>';
  document.querySelector('pre').innerText = JSON.stringify(found);
}}
</script>
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    wide = ("train.steps=20000", "train.sample_every=10000", "train.checkpoint_every=10000",
        "evaluate.checkpoints=null", "sample.checkpoint=last")  # fmt: skip
    places = [make_run(storage), make_run(storage, "cifar10", wide)]
    assert [list(report.STAGE.work(place)) for place in places] == [[], []]
    both = write_comparison(make_compared_runs(places), storage / "comparisons" / "both", "Both")
    return [*(place.report_html for place in places), both]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium (Debian: chromium)")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (820, True), (390, False), (390, True)])
def test_pages_load_and_fit(pages, tmp_path, width, dark):
    for page in pages:
        frame = tmp_path / "frame.html"
        frame.write_text(FRAME.format(page=page.as_uri(), width=width))
        options = [*QUIET.split(), *OPEN.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        options += ["--force-dark-mode"] * dark
        command = ["chromium", *options, "--dump-dom", frame.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in shown.stderr, shown.stderr
        found = json.loads(re.search(r"<pre>(.*?)</pre>", shown.stdout, re.DOTALL)[1])
        assert found.pop("size") == [width, width, True] and found.pop("dark") is dark
        assert found.pop("colour") == ("rgb(22, 25, 31)" if dark else "rgb(255, 255, 255)")
        assert set(map(tuple, found.values())) == {()}, found

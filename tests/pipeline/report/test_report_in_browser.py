"""The pages in a real Chromium: they load without a complaint, and nothing sticks out on a phone."""

import pytest
from browser import open_browser
from synthetic_run import make_run

from pipeline.report.compared_run import make_compared_runs
from pipeline.report.comparison import write_comparison
from pipeline.stages import report

# Wider than the window although no box around it scrolls.
STICKING_OUT = """
const inside = node => node && (getComputedStyle(node).overflowX !== 'visible' || inside(node.parentElement));
return [...document.querySelectorAll('body *')]
  .filter(node => node.getBoundingClientRect().right > innerWidth + 1 && !inside(node.parentElement))
  .map(node => node.outerHTML.slice(0, 120))
"""

# Numbers that are wider than their card.
CUT = """
return [...document.querySelectorAll('header td')].filter(node => node.scrollWidth > node.clientWidth + 1)
  .map(node => node.innerText)
"""
# The pictures, the verdict and the cards are seen without scrolling.
BELOW = """
return [...document.querySelectorAll('header img, header blockquote, header .scroll:first-of-type tr')]
  .filter(node => node.getBoundingClientRect().bottom > 844).map(node => node.outerHTML.slice(0, 120))
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    wide = ("train.steps=20000", "train.sample_every=10000", "train.checkpoint_every=10000",
        "evaluate.checkpoints=null", "sample.checkpoint=last")  # fmt: skip
    places = []
    for name, overrides in (("digits", ()), ("cifar10", wide)):
        experiment, run = make_run(storage, name, overrides)
        places.append(run.of(experiment))
        assert list(report.STAGE.work(places[-1])) == []
    both = write_comparison(make_compared_runs(places), storage / "comparisons" / "both", "Both")
    return [*(place.report_html for place in places), both]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (820, True), (390, False), (390, True)])
def test_pages_load_and_fit(pages, tmp_path, width, dark):
    with open_browser(tmp_path, width, dark) as browser:
        for page in pages:
            browser.open(page)
            assert browser.run("return innerWidth") == width, "or nothing of this means anything"
            assert browser.run(STICKING_OUT) == []
            assert browser.run(CUT) == [] and browser.run(BELOW) == []
            assert browser.run("return document.documentElement.scrollWidth") == width
            assert browser.run("return document.documentElement.scrollHeight") < 6 * 844
            assert browser.run("return [...document.images].filter(i => !i.naturalWidth).length") == 0
            assert browser.run("return matchMedia('(prefers-color-scheme: dark)').matches") is dark
            colour = browser.run("return getComputedStyle(document.documentElement).backgroundColor")
            assert colour == ("rgb(22, 25, 31)" if dark else "rgb(255, 255, 255)")
        assert browser.list_complaints() == []

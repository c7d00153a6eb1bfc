"""Pages and MLflow as a person sees them: a real Chromium, through the WebDriver protocol."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import GRID, ONE_CPU, TRIAL, free_port
from synthetic_run import make_run

from pipeline.cli.program import main
from pipeline.report.compared_run import make_compared_runs
from pipeline.report.comparison import write_comparison
from pipeline.stages import report

QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One window of a given width, in the light or the dark scheme."""

    def __init__(self, address: str, profile: Path, width: int, dark: bool):
        self.address, self.width = address, width
        options = {
            "args": [*QUIET, f"--user-data-dir={profile}", *(["--force-dark-mode"] if dark else [])],
            "mobileEmulation": {"deviceMetrics": {"width": width, "height": 844, "pixelRatio": 1}},
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.address += "/session/" + self._call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _call(self, path: str, content: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if content is None else json.dumps(content).encode()
        address = self.address if path or "/session/" in self.address else f"{self.address}/session"
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(address + path, data, kind, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path | str) -> None:
        """Open a file or an address."""
        self._call("/url", {"url": page if isinstance(page, str) else page.absolute().as_uri()})

    def run(self, script: str) -> Any:
        return self._call("/execute/sync", {"script": script, "args": []})

    def list_complaints(self) -> list[str]:
        """List what the page wrote to the console, and what it failed to load."""
        return [entry["message"] for entry in self._call("/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._call("", method="DELETE")


@contextmanager
def open_browser(folder: Path, width: int, dark: bool = False) -> Iterator[Browser]:
    """Start a browser and end it afterwards. Skips the test where there is no Chromium."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("needs Chromium and its chromedriver (Debian: chromium, chromium-driver)")
    with (folder / "chromedriver.log").open("w") as log:
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        browser = Browser(f"http://127.0.0.1:{_read_port(process)}", folder / "profile", width, dark)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait()


def _read_port(process: subprocess.Popen[str]) -> int:
    """Read the port that it chose, which it prints once it listens."""
    deadline = time.monotonic() + 60
    assert process.stdout is not None
    for line in process.stdout:
        if "started successfully on port" in line:
            return int(line.rstrip(".\n").split()[-1])
        assert time.monotonic() < deadline, "chromedriver did not start"
    raise AssertionError("chromedriver ended")


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
        places.append(make_run(storage, name, overrides))
        assert list(report.STAGE.work(places[-1])) == []
    both = write_comparison(make_compared_runs(places), storage / "comparisons" / "both", "Both")
    return [*(place.report_html for place in places), both]


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


pytestmark = pytest.mark.slow

SMALL = [*TRIAL, "train.sample_every=6"]
TRIALS = ("linear dropout=0.0", "linear dropout=0.2", "cosine dropout=0.0", "cosine dropout=0.2")


@pytest.fixture
def links(tmp_path, capsys) -> dict[str, str]:
    """What the sweep's last lines say: the links to the study and to its trials."""
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    assert main(["sweep", str(path), *SMALL, *ONE_CPU, f"cluster.storage={tmp_path}"]) == 0
    found = re.findall(r"(MLflow|its trials): .*?http://127\.0\.0\.1:5000/(\S+)", capsys.readouterr().out)
    return dict(found)


@pytest.fixture
def ui(links, tmp_path) -> Iterator[dict[str, str]]:
    """`ddpm ui` on the store: its links, by the name of what they show."""
    port = free_port()
    words = [sys.executable, "-m", "pipeline", "ui", f"--port={port}", f"cluster.storage={tmp_path}"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert server.stdout is not None
    lines = iter(server.stdout.readline, "Ctrl-C ends it\n")
    yield dict(line.strip().split(": ", 1) for line in lines if f": http://127.0.0.1:{port}/" in line)
    server.send_signal(signal.SIGINT)
    server.wait(30)


def wait_for_text(browser: Browser, holds: Callable[[str], bool], seconds: float = 120) -> str:
    """Wait until the text of the page holds, and return it."""
    end = time.monotonic() + seconds
    while not holds(text := browser.run("return document.body.innerText")):
        assert time.monotonic() < end, text
        time.sleep(0.5)
    return text


def click(browser: Browser, label: str) -> None:
    """Click on the link of that text."""
    found = f"[...document.querySelectorAll('a')].find(a => a.innerText.trim() === {label!r})"
    assert browser.run(f"const link = {found}; if (link) link.click(); return !!link"), label


def test_a_person_finds_the_winner_the_trials_and_their_samples(links, ui, tmp_path: Path):
    with open_browser(tmp_path, 1500) as browser:
        browser.open(ui["grid"])
        columns = ("nll_bpd", "loss/train", *TRIALS)
        wait_for_text(browser, lambda text: all(words in text for words in columns))
        server = ui["all"].partition("/#")[0]
        browser.open(f"{server}/{links['MLflow']}")
        wanted = (*TRIALS, "has the lowest NLL")
        text = wait_for_text(browser, lambda text: all(words in text for words in wanted))
        assert "best_trial" in text and "cosine dropout=0.0 has the lowest NLL" in text
        browser.open(f"{server}/{links['its trials']}")
        text = wait_for_text(browser, lambda text: "4 matching runs" in text)
        assert "sweep grid" not in text, "the trials alone"
        click(browser, "cosine dropout=0.0")
        wait_for_text(browser, lambda text: "sweep.trial" in text)
        address = browser.run("return location.href").partition("?")[0]
        browser.open(f"{address}/model-metrics?workflowType=machine_learning")
        sections = ("\nloss\n(", "\nsamples\n(", "\ntrain\n(", "\nModel metrics\n(")
        charts = wait_for_text(browser, lambda text: all(section in text for section in sections))
        assert charts.index(sections[0]) < min(map(charts.index, sections[1:]))
        browser.open(f"{address}/artifacts/samples/grid.png")
        wide = "return Math.max(0, ...[...document.images].filter(i => i.complete).map(i => i.naturalWidth))"
        wait_for_text(browser, lambda text: browser.run(wide) >= 80)

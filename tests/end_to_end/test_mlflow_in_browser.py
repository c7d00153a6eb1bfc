"""A sweep as a person sees it: `ddpm ui` on its store, in a real Chromium."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Browser, open_browser
from conftest import GRID, ONE_CPU, TRIAL, free_port

from pipeline.cli.program import main

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
        columns = ("nll_bpd", "loss/train", "sweep grid")
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

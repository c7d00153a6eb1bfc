"""docs/results/cifar10.md says what its JSON twin says, and every page's links lead somewhere."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "docs" / "results"


def test_links_lead_to_files():
    checked = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                checked += 1
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
    assert checked > 15


def test_the_scores_of_the_page_are_those_of_its_twin():
    page, twin = (RESULTS / "cifar10.md").read_text(), json.loads((RESULTS / "cifar10.json").read_text())
    scores = twin["scores"]
    assert all(
        f"{scores[key]:.4f}" in page for key in ("nll_bpd", "rate_bpd", "distortion_bpd", "rmse", "fid")
    )
    assert len(twin["sweep"]["trials"]) >= 7
    assert all(f"{trial['scores']['nll_bpd']:.4f}" in page for trial in twin["sweep"]["trials"])


def test_a_network_that_loses_to_the_linear_denoiser_is_called_not_yet_useful_first():
    page, scores = (
        (RESULTS / "cifar10.md").read_text(),
        json.loads((RESULTS / "cifar10.json").read_text())["scores"],
    )
    first = page.split("\n\n")[1]
    beaten = scores["rate_bpd"] < 2.4528 and scores["rmse"] < 1.1035
    assert beaten != ("Not yet useful" in first.split(":")[0])

"""The fit of the ladder finds a law that it was given, and says how sure it is."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location("ladder", Path("docs/results/ladder.py"))
ladder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ladder)

RATE, DISTORTION = np.array([1.5, 0.3, 0.5, 4.0, 0.4]), np.array([1.9, 0.1, 0.5, 1.0, 0.4])
LAWS = {"rate_bpd": RATE, "distortion_bpd": DISTORTION}


def make_points(*widths: int) -> list[dict]:
    draw, points = np.random.default_rng(1), []
    for width in widths:
        for k in range(6):
            point = {"width": width, "parameters": 2200 * width**2, "images": 8000 * 2**k}
            for name, law in LAWS.items():
                exact = ladder.compute_law(law, [point])[0]
                point |= {name: exact + 1e-4 * draw.normal(), f"{name}_se": 0.003}
            total = point["rate_bpd"] + point["distortion_bpd"]
            points.append(point | {"nll_bpd": total, "nll_bpd_se": 0.003, "protocol": {"nll_timesteps": 7}})
    return points


def test_the_prediction_holds_the_truth_and_few_points_predict_nothing(monkeypatch):
    monkeypatch.setattr(ladder, "RESAMPLES", 40)
    found = ladder.predict(points := make_points(32, 48, 64))
    truth = {name: ladder.compute_law(law, [ladder.PAPER])[0] for name, law in LAWS.items()}
    for name, value in {**truth, "nll_bpd": sum(truth.values())}.items():
        low, high = found["prediction"][name]["interval"]
        assert low < value < high and high - low < 0.2
    assert all(one["predicted"] == pytest.approx(one["found"], abs=0.01) for one in found["longest"])
    page = ladder.format_page({"points": points, **found, "from_small": found})
    assert "so wrong: none" in page, "nothing was measured"
    assert "| nll_bpd |" in page and page.count("predicted from the shorter runs") == 6

    found = ladder.predict(points := make_points(32))
    assert found["prediction"] is None
    assert "None yet: a fit needs 3 lengths of 2 widths" in ladder.format_page({"points": points, **found})

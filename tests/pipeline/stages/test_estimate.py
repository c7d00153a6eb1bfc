"""The NLL of a whole split by a few timesteps of each image: does its error hold what it promises?"""

import numpy as np
import pytest
import torch
from conftest import one_cpu, tiny_experiment
from coverage_of_errors import measure_coverage
from staged import results, run_stage, scoring

from pipeline.engine.find import make_place
from pipeline.errors import ConfigError
from pipeline.scores import preparations
from pipeline.stages import evaluate
from pipeline.store import tars
from pipeline.store.files import read_json


def test_95_of_100_intervals_of_the_digits_hold_the_linear_denoisers_rate(sharded_storage, tmp_path):
    """statistics.md, section 1, test 2, in its twin that never skips."""
    pixels = tars.load_images(make_place(tiny_experiment(), sharded_storage).data, "test")[0]
    held, spread, error = measure_coverage(torch.from_numpy(pixels).flatten(1).double() / 127.5 - 1, tmp_path)
    assert 89 <= held <= 99 and error == pytest.approx(spread, rel=0.25)
    assert error == pytest.approx(0.0161, rel=0.1), "as measured: other shares than the line's make it wide"


def test_the_estimate_has_the_full_bound_as_its_mean_and_says_how_it_came_about(sampled):
    sampled = scoring(sampled, nll_images=None, nll_batch_size=180)
    few = scoring(sampled, nll_timesteps=4)
    assert len([name for name in run_stage(evaluate, few) if "NLL" in name]) == 2
    assert not run_stage(evaluate, few) and len(run_stage(evaluate, sampled)) == 2
    found, full = results(few), results(sampled)
    nll = read_json(few.nll_json, dict)
    for name in ("nll_bpd", "rate_bpd"):
        assert 0 < abs(found["scores"][name] - full["scores"][name]) < 3 * nll["set_se"]
        assert 0 < full["scores"][f"{name}_se"] < found["scores"][f"{name}_se"]
    for name in ("distortion_bpd", "rmse", "prior_bpd"):
        assert found["scores"][name] == pytest.approx(full["scores"][name], rel=1e-5)
    few_se, full_se = (one["scores"]["distortion_bpd_se"] for one in (found, full))
    assert few_se == pytest.approx(full_se, rel=1e-4)
    assert np.mean(nll["images"]) == pytest.approx(found["scores"]["nll_bpd"], abs=1e-5)
    protocol = found["protocol"]
    assert "the covariance of all 1,437 training images" in protocol["nll_profile"]
    assert (protocol["nll_timesteps"], full["protocol"]["nll_timesteps"]) == (4, None)
    assert protocol["why_not"] == full["protocol"]["why_not"], "it is as comparable as the full bound"


def test_one_image_has_no_error_and_says_so(sampled):
    run_stage(evaluate, one := scoring(sampled, nll_images=1, nll_timesteps=1))
    found = results(one)["scores"]
    assert found["nll_bpd_se"] is None and found["nll_bpd_se_reason"] == "one image"
    assert read_json(one.nll_json, dict)["set_se"] is None


def test_more_draws_than_timesteps_are_refused():
    with pytest.raises(ConfigError, match=r"evaluate.nll_timesteps is 21, more than diffusion.timesteps=20"):
        tiny_experiment("evaluate.nll_timesteps=21")


def test_images_too_large_for_a_covariance_have_a_profile_by_their_gram_matrix(tiny_run, monkeypatch):
    """Its directions are unit vectors, and its variances those of images that did not choose the directions."""
    run = tiny_run
    monkeypatch.setattr(preparations, "LARGEST_GAUSSIAN", 63)
    monkeypatch.setattr(preparations, "GRAM", 64 * 40)
    one_cpu().run_units(preparations.list_gaussian_units(run), lambda unit: None)
    variances, source = preparations.load_variances(run)
    assert source == "the Gram matrix of 40 training images" and preparations.locate_gaussian(run) is None
    images = tars.load_images(run.data, "train", 0, 40)[0].reshape(40, -1) / 127.5 - 1
    expected = ((images[20:] - images.mean(axis=0)) ** 2).sum(axis=1).mean()
    assert variances.sum().item() == pytest.approx(expected)
    assert (variances[20:] == variances[20]).all() and variances[20] > 0

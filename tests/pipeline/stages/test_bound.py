"""The NLL of a run's network, in units: the bound of all timesteps, and its estimate by a few of them."""

import numpy as np
import pytest
import torch
from conftest import one_cpu, tiny_experiment
from coverage_of_errors import measure_coverage
from staged import asking_for, results, run_stage, scoring

from pipeline.engine.find import make_place
from pipeline.errors import ConfigError, PipelineError
from pipeline.scores import preparations
from pipeline.stages import evaluate
from pipeline.stages.evaluate import bound
from pipeline.store import tars
from pipeline.store.files import read_json


def test_other_units_give_the_same_bound_and_bf16_one_that_is_near_and_says_so(sampled):
    other, fast = scoring(sampled, nll_batch_size=5), scoring(sampled, precision="bf16")
    for asked in (sampled, other, fast):
        assert len(run_stage(evaluate, asked)) == 2
    exact, near = results(sampled), results(fast)
    assert results(other)["scores"] == pytest.approx(exact["scores"], rel=1e-5)
    nll = read_json(sampled.nll_json, dict)
    last = nll["rate_distortion"][-1]
    assert exact["scores"]["nll_bpd"] == pytest.approx(sum(nll["terms"]) + nll["prior"], rel=1e-5)
    assert nll["prior"] > 0.1 and last["rmse"] == pytest.approx(exact["scores"]["rmse"])
    assert (exact["protocol"]["nll_precision"], near["protocol"]["nll_precision"]) == ("fp32", "bf16")
    assert 0 < abs(near["scores"]["nll_bpd"] / exact["scores"]["nll_bpd"] - 1) < 0.02


def test_another_metric_repeats_nothing_and_a_killed_stage_goes_on(sampled):
    units = next(evaluate.STAGE.work(sampled))
    one_cpu().run_units(units[:1], lambda unit: None)
    assert run_stage(evaluate, sampled) == ["NLL of test images 4-5"]
    assert evaluate.STAGE.is_done(sampled)
    assert "NLL of 6 test images, not all of CIFAR-10's" in results(sampled)["protocol"]["why_not"]
    before = results(sampled)["scores"]
    everything = scoring(sampled, metrics=("fid", "is", "nll"), features="projection")
    ran = run_stage(evaluate, everything)
    assert ran and not [name for name in ran if "NLL" in name]
    assert before.items() <= results(everything)["scores"].items()
    assert not run_stage(evaluate, everything), "all units are on disk"
    assert not run_stage(evaluate, scoring(everything, metrics=("fid",)))


def test_nll_depends_on_weights_and_decoder_but_not_on_the_sampler(sampled):
    units = bound.plan_units(sampled)
    assert list(units) == list(bound.plan_units(asking_for(sampled, sampler="ddim", num_images=99)))
    for other in (
        asking_for(sampled, weights="raw"),
        asking_for(sampled, checkpoint=4),
        scoring(sampled, decoder="erf"),
        scoring(sampled, variance="fixedsmall"),
    ):
        assert not set(units) & set(bound.plan_units(other))


def test_more_test_images_than_there_are_is_refused(tiny_run):
    with pytest.raises(PipelineError, match="nll_images is 361, but the test split has 360"):
        run_stage(evaluate, scoring(tiny_run, nll_images=361))


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
    """Its directions are unit vectors, its variances those of images that did not choose them."""
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

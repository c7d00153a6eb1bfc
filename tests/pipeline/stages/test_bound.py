"""The NLL bound of the run's network, in units."""

import numpy as np
import pytest
import torch
from conftest import one_cpu
from staged import asking_for, results, run_stage, scoring

from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from ddpm.likelihood import compute_bits_per_dim
from ddpm.rng import Stream, draw_normal
from pipeline.errors import PipelineError
from pipeline.stages import evaluate
from pipeline.stages.evaluate import bound
from pipeline.store import checkpoint, tars
from pipeline.store.files import read_json


def test_nll_is_the_bound_of_the_first_test_images(sampled):
    units = bound.plan_units(sampled).values()
    assert [(unit.images, unit.passes) for unit in units] == [(4, 20), (2, 20)]
    assert run_stage(evaluate, sampled) == ["NLL of test images 0-3", "NLL of test images 4-5"]
    images = from_uint8(torch.from_numpy(tars.load_images(sampled.data, "test", 0, 6)[0]))
    index = torch.arange(6)
    expected = compute_bits_per_dim(
        Diffusion(sampled.experiment.diffusion), checkpoint.load_model(sampled, torch.device("cpu")).net,
        images, lambda t, rows: draw_normal(sampled.experiment.seed, Stream.NLL, t, index[rows], (1, 8, 8)),
    )  # fmt: skip
    scores, nll = results(sampled)["scores"], read_json(sampled.nll_json, dict)
    assert scores["nll_bpd"] == pytest.approx(float(expected.total.mean()), rel=1e-5)
    assert np.allclose(nll["terms"], expected.terms.mean(dim=0), rtol=1e-4, atol=1e-6)
    assert np.allclose(nll["mse"], expected.mse.mean(dim=0), rtol=1e-4)
    assert nll["n"] == 6 and nll["prior"] == scores["prior_bpd"]
    last = nll["rate_distortion"][-1]
    assert (last["k"], last["rate_bpd"], last["rmse"]) == (20, scores["rate_bpd"], scores["rmse"])
    assert scores["rate_bpd"] + scores["distortion_bpd"] == pytest.approx(scores["nll_bpd"], rel=1e-12)
    assert last["rmse"] == pytest.approx(127.5 * nll["mse"][0] ** 0.5)


def test_other_units_give_the_same_bound_and_bf16_one_that_is_near_and_says_so(sampled):
    other, fast = scoring(sampled, nll_batch_size=5), scoring(sampled, precision="bf16")
    for asked in (sampled, other, fast):
        assert len(run_stage(evaluate, asked)) == 2
    exact, near = results(sampled), results(fast)
    assert results(other)["scores"] == pytest.approx(exact["scores"], rel=1e-5)
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

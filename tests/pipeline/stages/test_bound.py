"""The NLL bound of the run's network, in units."""

import pytest
from conftest import one_cpu
from staged import asking_for, results, run_stage, scoring

from pipeline.errors import PipelineError
from pipeline.stages import evaluate
from pipeline.stages.evaluate import bound


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

"""Evaluation: scores from units that are kept under what they depend on, never without their protocol."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import one_cpu
from staged import asking_for, run_stage, with_weights

from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from ddpm.likelihood import bits_per_dim
from ddpm.rng import Stream, normal
from pipeline import checkpoint, evaluate, sample, tars
from pipeline.errors import PipelineError
from pipeline.evaluate import bound, protocol
from pipeline.fidelity import classifier, extractors, preparations, scores
from pipeline.fidelity.reference import Reference
from pipeline.rundir import read_json

CPU = torch.device("cpu")
FIDELITY = ("fid", "is")


def scoring(experiment, **changes):
    return dataclasses.replace(experiment, evaluate=dataclasses.replace(experiment.evaluate, **changes))


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 20)


@pytest.fixture
def sampled(tiny_run):
    experiment, run = tiny_run
    with_weights(experiment, run)
    run_stage(sample, experiment, run)
    return experiment, run


def results(experiment, run):
    return read_json(evaluate.directory(experiment, run) / "metrics.json")


# FID and IS


@pytest.mark.parametrize("features", ["classifier", "projection"])
def test_scores_stand_with_reference_points_and_protocol(sampled, features):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=FIDELITY, features=features)
    assert not evaluate.is_done(experiment, run)
    run_stage(evaluate, experiment, run)
    assert evaluate.is_done(experiment, run)
    found = results(experiment, run)
    points, how = found["reference_points"], found["protocol"]
    assert list(points) == ["gaussian", "noise", "test"] and all(
        point["n"] == 12 for point in points.values()
    )
    assert how["n"] == 12 and how["reference_images"] == 1437 and how["rounding"] == "nearest"
    assert not how["comparable"]
    reasons = " | ".join(how["why_not"])
    assert "n = 12, not 50,000" in reasons and "rank-deficient: n = 12 is not above 64" in reasons
    assert f"features of {how['extractor']}" in reasons and how["extractor"].startswith(f"{features}-")
    if features == "classifier":
        assert set(found["scores"]) == {"fid", "is_mean", "is_std", "is_shuffled_mean", "is_shuffled_std"}
        assert sum(found["class_shares"]) == pytest.approx(1) and len(found["class_shares"]) == 10
    else:
        assert set(found["scores"]) == {"fid"} and "no IS" in reasons and "class_shares" not in found


def test_scores_are_those_of_the_stored_images(sampled):
    """Against features of all images at once, in one part, by another way to the same numbers."""
    experiment, run = sampled
    experiment = scoring(experiment, metrics=FIDELITY)
    run_stage(evaluate, experiment, run)
    extractor = preparations.extractor_of(experiment, run)

    def score(folder, split, n=None):
        images, _ = tars.load_images(folder, split, 0, n)
        return scores.score([extractors.extract(extractor, images, CPU)], len(images))

    train = score(run.data, "train").moments.statistics()
    drawn, test = score(sample.directory(experiment, run), "samples", 12), score(run.data, "test", 12)
    found = results(experiment, run)
    assert found["scores"]["fid"] == pytest.approx(
        scores.frechet_distance(drawn.moments.statistics(), train), rel=1e-6
    )
    assert found["scores"]["is_mean"] == pytest.approx(drawn.sums.inception_score()[0], rel=1e-6)
    point = found["reference_points"]["test"]["fid"]
    assert point == pytest.approx(scores.frechet_distance(test.moments.statistics(), train), rel=1e-6)
    assert found["scores"]["fid"] != pytest.approx(point, rel=0.1)


def test_against_the_test_split_the_training_images_are_the_reference_point(sampled):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=("fid",), reference="test")
    run_stage(evaluate, experiment, run)
    found = results(experiment, run)
    assert sorted(found["reference_points"]) == ["gaussian", "noise", "train"]
    assert found["protocol"]["reference_images"] == 360
    assert "reference test, not train" in found["protocol"]["why_not"]


def test_a_short_set_is_refused_and_a_longer_one_is_cut(sampled):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=("fid",))
    with pytest.raises(PipelineError, match="holds 12 images where 13 are to be scored"):
        run_stage(evaluate, asking_for(experiment, num_images=13), run)
    shorter = asking_for(experiment, num_images=8)
    run_stage(evaluate, shorter, run)
    assert results(shorter, run)["protocol"]["n"] == 8


def test_a_unit_with_a_row_too_few_is_refused(sampled):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=("fid",))
    run_stage(evaluate, experiment, run)
    extractor = preparations.extractor_of(experiment, run)
    last = evaluate.sample_shards(experiment, run)[-1]
    file = run.evaluation("units") / extractor.name / f"{last.sha256[:16]}.npz"
    with np.load(file) as arrays:
        cut = {name: array[:-1] if array.ndim else array for name, array in arrays.items()}
    np.savez(file, **cut)
    with pytest.raises(PipelineError, match=r"11 images .* 12 "):
        run_stage(evaluate, experiment, run)


def test_reference_statistics_are_never_stale(sampled):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=("fid",), features="projection")
    run_stage(evaluate, experiment, run)
    extractor = preparations.extractor_of(experiment, run)
    reference = Reference.of(run, extractor, "train")
    assert reference.load().n == 1437
    assert dataclasses.replace(reference, content="of other images").load() is None
    assert Reference.of(run, extractor, "test").file != reference.file
    assert run.data in reference.file.parents and extractor.name in reference.file.name


def test_drawing_other_images_makes_the_scores_again(sampled):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=("fid",), features="projection")
    run_stage(evaluate, experiment, run)
    before = results(experiment, run)["scores"]["fid"]
    with_weights(experiment, run, scale=0.5)
    for tar in sample.directory(experiment, run).glob("*.tar"):
        tar.unlink()
    run_stage(sample, experiment, run)
    assert not evaluate.is_done(experiment, run)
    run_stage(evaluate, experiment, run)
    assert results(experiment, run)["scores"]["fid"] != pytest.approx(before, rel=1e-3)


def test_labels_beyond_the_classes_are_refused(sampled):
    _, run = sampled
    with pytest.raises(PipelineError, match=r"labels 0\.\.9 .*data\.labels=5 allows 0\.\.4"):
        preparations.train_classifier(one_cpu().context, run, 5)


# The NLL bound


def test_nll_is_the_bound_of_the_first_test_images(sampled):
    experiment, run = sampled
    assert sorted(run_stage(evaluate, experiment, run)) == [
        "NLL of test images 0-3",
        "NLL of test images 4-5",
    ]
    images = from_uint8(torch.from_numpy(tars.load_images(run.data, "test", 0, 6)[0]))
    index = torch.arange(6)
    net = checkpoint.load_network(experiment, run, 6, "ema", CPU)
    expected = bits_per_dim(
        Diffusion(experiment.diffusion), net, images,
        lambda t: normal(experiment.seed, Stream.NLL, t, index, (1, 8, 8)),
    )  # fmt: skip
    scores_, nll = (
        results(experiment, run)["scores"],
        read_json(evaluate.directory(experiment, run) / "nll.json"),
    )
    assert scores_["nll_bpd"] == pytest.approx(float(expected.total.mean()), rel=1e-5)
    assert np.allclose(nll["terms"], expected.terms.mean(dim=0), rtol=1e-4, atol=1e-6)
    assert np.allclose(nll["mse"], expected.mse.mean(dim=0), rtol=1e-4)
    assert nll["n"] == 6 and nll["prior"] == scores_["prior_bpd"]
    last = nll["rate_distortion"][-1]
    assert (last["k"], last["rate_bpd"], last["rmse"]) == (20, scores_["rate_bpd"], scores_["rmse"])
    assert scores_["rate_bpd"] + scores_["distortion_bpd"] == pytest.approx(scores_["nll_bpd"], rel=1e-12)
    assert last["rmse"] == pytest.approx(127.5 * nll["mse"][0] ** 0.5)


def test_other_units_give_the_same_bound(sampled):
    experiment, run = sampled
    other = scoring(experiment, nll_batch_size=5)
    run_stage(evaluate, experiment, run)
    assert len(run_stage(evaluate, other, run)) == 2
    assert results(other, run)["scores"] == pytest.approx(results(experiment, run)["scores"], rel=1e-5)


def test_another_metric_repeats_nothing(sampled):
    experiment, run = sampled
    run_stage(evaluate, experiment, run)
    before = results(experiment, run)["scores"]
    everything = scoring(experiment, metrics=("fid", "is", "nll"), features="projection")
    ran = run_stage(evaluate, everything, run)
    assert ran and not [name for name in ran if "NLL" in name]
    assert before.items() <= results(everything, run)["scores"].items()
    assert not run_stage(evaluate, everything, run), "all units are on disk"
    only_is = scoring(everything, metrics=("fid",))
    assert not run_stage(evaluate, only_is, run)


def test_nll_depends_on_weights_and_decoder_but_not_on_the_sampler(sampled):
    experiment, run = sampled
    units = bound.units(experiment, run)
    assert list(units) == list(bound.units(asking_for(experiment, sampler="ddim", num_images=99), run))
    for other in (
        asking_for(experiment, weights="raw"),
        asking_for(experiment, checkpoint="4"),
        scoring(experiment, decoder="erf"),
        scoring(experiment, variance="fixedsmall"),
    ):
        assert not set(units) & set(bound.units(other, run))


def test_nll_needs_no_samples(tiny_run):
    experiment, run = tiny_run
    with_weights(experiment, run)
    run_stage(evaluate, experiment, run)
    assert evaluate.is_done(experiment, run)
    assert results(experiment, run)["protocol"]["why_not"] == ["NLL of 6 of 360 test images"]


def test_more_test_images_than_there_are_is_refused(sampled):
    experiment, run = sampled
    with pytest.raises(PipelineError, match="nll_images is 361, but the test split has 360"):
        run_stage(evaluate, scoring(experiment, nll_images=361), run)


def test_a_killed_stage_goes_on_with_what_is_missing(sampled):
    experiment, run = sampled
    units = next(evaluate.work(experiment, run))
    one_cpu().map_units(units[:1], lambda unit: None)
    assert run_stage(evaluate, experiment, run) == ["NLL of test images 4-5"]


@pytest.mark.parametrize(
    ("images", "shape", "timesteps"),
    [(25, (1, 8, 8), 10), (4, (3, 32, 32), 64), (250, (3, 32, 32), 1), (8, (3, 256, 256), 1)],
)
def test_a_network_call_of_the_bound_is_large_but_bounded(images, shape, timesteps):
    assert bound.timesteps_per_call(images, shape) == timesteps


# The protocol

PAPER = {
    "weights": "ema", "n": 50_000, "features": 2048, "sampler": "ancestral", "steps": 1000, "timesteps": 1000,
    "official_extractor": True, "extractor": "inception-v3-compat-6726825d", "reference": "train", "splits": 10,
    "decoder": "tanh", "nll_images": 10_000, "test_images": 10_000,
}  # fmt: skip


def test_the_papers_protocol_is_comparable():
    assert protocol.why_not(PAPER, ("fid", "is", "nll")) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 49_999}, "n = 49,999, not 50,000"),
        ({"n": 2048}, "rank-deficient"),
        ({"weights": "raw"}, "raw weights"),
        ({"sampler": "ddim"}, "ddim sampler"),
        ({"steps": 250}, "250 steps"),
        ({"official_extractor": False}, "not of the published Inception"),
        ({"reference": "test"}, "reference test"),
        ({"nll_images": 9_984}, "NLL of 9984 of 10000"),
        ({"decoder": "erf"}, "erf decoder"),
        ({"splits": None}, "no IS"),
    ],
)
def test_each_departure_from_it_is_a_reason(change, reason):
    assert any(reason in found for found in protocol.why_not(PAPER | change, ("fid", "is", "nll")))


def test_what_was_not_scored_is_no_reason():
    assert protocol.why_not(PAPER | {"n": 16, "official_extractor": False}, ("nll",)) == []
    assert protocol.why_not(PAPER | {"nll_images": 4}, ("fid",)) == []


def test_looking_whether_it_is_done_loads_no_fidelity_library():
    """`ddpm run` on a run that is up to date takes seconds."""
    code = "import sys, pipeline.evaluate, pipeline.figures; assert 'torch_fidelity' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

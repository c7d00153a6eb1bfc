"""Evaluation: scores and bounds from units kept under what they depend on, never without their protocol."""

import numpy as np
import pytest
import torch
from conftest import one_cpu, tiny_experiment
from coverage_of_errors import measure_coverage
from staged import asking_for, evaluated, results, run_stage, scoring, with_weights
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ddpm.config import DiffusionConfig
from pipeline.engine.find import make_place
from pipeline.errors import PipelineError
from pipeline.scores import classifier, extractors, jackknife, preparations
from pipeline.scores.extractors import find_extractor
from pipeline.stages import evaluate, sample
from pipeline.stages.evaluate import bound, list_sample_shards, protocol
from pipeline.stages.evaluate.protocol import explain_differences
from pipeline.store import tars
from pipeline.store.files import read_json


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 20)


@pytest.mark.parametrize("features", ["classifier", "projection"])
def test_all_scores_are_torch_fidelitys_of_the_images_with_their_protocol(sampled, features):
    """By another way to the same numbers: features of all images at once, in one part, from the tars."""
    sampled = scoring(sampled, metrics=("fid", "fid_test", "is", "kid", "prc"), features=features)
    assert not evaluate.STAGE.is_done(sampled)
    found = evaluated(sampled)
    assert evaluate.STAGE.is_done(sampled)
    extractor = find_extractor(sampled)
    (own, logits), (real, _), (test, _) = (
        map(torch.from_numpy, extractors.extract_features(extractor, images, torch.device("cpu")))
        for images, _ in (
            tars.load_images(sampled.samples, "samples", 0, 12),
            tars.load_images(sampled.data, "train"), tars.load_images(sampled.data, "test"),
        )
    )  # fmt: skip
    statistics = [fid_features_to_statistics(part.double()) for part in (own, real, test, test[:12])]
    fid, fid_test, fid_of_point = (
        fid_statistics_to_metric(statistics[a], statistics[b], verbose=False)["frechet_inception_distance"]
        for a, b in ((0, 1), (0, 2), (3, 1))
    )
    rms = real.double().square().mean().sqrt().float()
    kid = kid_features_to_metric(own / rms, real / rms, kid_subset_size=6, verbose=False)
    prc = prc_features_to_metric(own, real, verbose=False)
    expected = {"fid": fid, "fid_test": fid_test, "precision": prc["precision"], "recall": prc["recall"]}
    expected |= {f"kid_{part}": kid[f"kernel_inception_distance_{part}"] for part in ("mean", "std")}
    for name, shuffle in (("is", False), ("is_shuffled", True)) if features == "classifier" else ():
        isc = isc_features_to_metric(logits, shuffle=shuffle)
        expected |= {f"{name}_{part}": isc[f"inception_score_{part}"] for part in ("mean", "std")}
    how, points = found["protocol"], found["reference_points"]
    reasons = " | ".join(how["why_not"])
    values = {name: value for name, value in found["scores"].items() if "_se" not in name}
    assert values == pytest.approx(expected, rel=1e-5)
    assert found["scores"]["fid_se"] is None
    assert found["scores"]["recall_se_reason"] == "12 images are fewer than 30"
    assert len({round(value, 3) for value in (fid, fid_test, fid_of_point)}) == 3
    assert list(points) == ["gaussian", "noise", "test"] and {point["n"] for point in points.values()} == {12}
    assert points["test"]["fid"] == pytest.approx(fid_of_point, rel=1e-5)
    assert {"kid_mean", "recall"} <= points["test"].keys() and "fid_test" not in points["test"]
    assert how["kid"].startswith("100 subsets of 6 images, cubic kernel, seed 2020")
    assert how["prc"] == f"3 neighbours in the features of {extractor.name}, not of VGG-16"
    assert (how["n"], how["reference_images"], how["fid_test_images"]) == (12, 1437, 360)
    assert how["rounding"] == "nearest" and how["extractor"].startswith(f"{features}-")
    assert not how["comparable"] and f"features of {how['extractor']}" in reasons
    assert "n = 12, not 50,000" in reasons and "rank-deficient: n = 12 is not above 64" in reasons
    if features == "classifier":
        assert sum(found["class_shares"]) == pytest.approx(1) and len(found["class_shares"]) == 10
        assert 0.8 < how["classifier_accuracy"] < 1  # trained for 20 steps
    else:
        assert "no IS" in reasons and "class_shares" not in found


def test_errors_stand_beside_scores_and_real_images_beside_as_many_samples(sampled, monkeypatch):
    """With 8 test images the first 8 samples are scored too; a single unit has no error, and says why."""
    asked = scoring(sampled, metrics=("fid", "kid", "prc"), features="projection")
    shards = type(tars.open_shards(sampled.data))
    monkeypatch.setattr(jackknife, "LEAST_IMAGES", 8)
    monkeypatch.setattr(shards, "count_images", lambda _, split: 8 if split == "test" else 1437)
    found = evaluated(asked)
    scores, points = found["scores"], found["reference_points"]
    assert found["protocol"]["jackknife_groups"] == len(list_sample_shards(asked)) > 1
    assert all(scores[f"{name}_se"] > 0 for name in ("fid", "kid_mean"))
    assert points["samples"]["n"] == points["test"]["n"] == 8
    assert points["samples"]["fid_se"] > 0 and points["samples"]["fid"] != scores["fid"]
    monkeypatch.setattr(jackknife, "MOST_GROUPS", 1)
    scores = evaluated(scoring(asked, metrics=("fid",)))["scores"]
    assert scores["fid_se"] is None and "a single unit" in scores["fid_se_reason"]


def test_against_the_test_split_the_training_images_are_the_point_and_other_images_are_scored_again(sampled):
    sampled = scoring(sampled, metrics=("fid",), features="projection", reference="test")
    found = evaluated(sampled)
    assert sorted(found["reference_points"]) == ["gaussian", "noise", "train"]
    assert found["protocol"]["reference_images"] == 360
    assert "reference test, not train" in found["protocol"]["why_not"]
    with_weights(sampled, scale=0.5)
    for tar in sampled.samples.glob("*.tar"):
        tar.unlink()
    run_stage(sample, sampled)
    assert not evaluate.STAGE.is_done(sampled)
    assert evaluated(sampled)["scores"]["fid"] != pytest.approx(found["scores"]["fid"], rel=1e-3)


# Fields that the paper leaves free, or that another one judges.
FREE = {
    "checkpoint", "checkpoint_rule", "code", "first_index", "eta", "seed", "batch_size", "compiled", "extractor",
    "features", "kid", "prc", "is_shuffle_seed", "jackknife_groups", "nll_split", "test_images", "train_images",
    "nll_timesteps", "nll_profile", "nll_se", "nll_compiled", "classifier_accuracy",
}  # fmt: skip
PAPER = {
    "weights": "ema", "n": 50_000, "features": 2048, "sampler": "ancestral", "steps": 1000, "timesteps": 1000,
    "official_extractor": True, "extractor": "inception-v3-compat-6726825d", "reference": "train", "splits": 10,
    "decoder": "tanh", "nll_images": 10_000, "test_images": 10_000, "official_data": True, "conditional": False,
    "schedule": "linear, beta 0.0001 to 0.02", "minimum_fid": True, "checkpoint_rule": "best", "label": None,
    "variance": "fixedlarge", "guidance_scale": 1.0, "precision": "fp32", "rounding": "nearest",
    "reference_images": 50_000, "fid_test_images": 10_000, "nll_variance": "fixedlarge", "nll_precision": "fp32",
    "nll_split": "test",
}  # fmt: skip


def test_every_recorded_field_has_a_verdict_and_every_other_value_or_silence_is_a_reason(sampled):
    """What the protocol records and what is judged are one list (faults 1.7, 1.9, 1.22)."""
    found = evaluated(scoring(sampled, metrics=protocol.ALL, features="classifier"))
    recorded = found["protocol"].keys() - {"comparable", "why_not"}
    assert set(protocol.PAPER) <= recorded <= set(protocol.PAPER) | FREE
    for field in protocol.PAPER:
        other = {**PAPER, field: "train" if field == "label" else 7}
        silent = {key: value for key, value in PAPER.items() if key != field}
        assert explain_differences(other, protocol.ALL), field
        assert field == "n" or explain_differences(silent, protocol.ALL), field


def test_the_papers_protocol_is_comparable_and_what_was_not_scored_is_no_reason():
    assert explain_differences(PAPER, ("fid", "fid_test", "is", "nll")) == []
    assert explain_differences(PAPER | {"nll_split": "train", "nll_images": 50_000}, ("nll",)) == []
    assert explain_differences(PAPER | {"n": 16, "official_extractor": False}, ("nll",)) == []
    assert explain_differences(PAPER | {"nll_images": 4}, ("fid",)) == []
    assert len(explain_differences(PAPER | {"sampler": "ddim", "variance": None}, ("fid",))) == 1
    assert protocol.describe_schedule(DiffusionConfig()) == PAPER["schedule"]
    cosine = protocol.describe_schedule(DiffusionConfig(beta_schedule="cosine"))
    assert cosine == "cosine, beta 4.12842e-05 to 0.999", "not the ends that are set"


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
    for metric in ("nll", "fid", "kid"):  # whose reference images are needed beside their statistics
        asked = scoring(everything, metrics=(metric,))
        assert not run_stage(evaluate, asked), "all units are on disk"
    assert {"kid_mean", "kid_std"} <= set(results(asked)["scores"])


def test_nll_depends_on_weights_and_decoder_but_not_on_the_sampler(sampled):
    units = bound.plan_units(sampled)
    assert list(units) == list(bound.plan_units(asking_for(sampled, sampler="ddim", num_images=99)))
    others = [asking_for(sampled, weights="raw"), asking_for(sampled, checkpoint=4)]
    others += [scoring(sampled, decoder="erf"), scoring(sampled, variance="fixedsmall")]
    assert not any(set(units) & set(bound.plan_units(other)) for other in others)


def test_95_of_100_intervals_of_the_digits_hold_the_linear_denoisers_rate(sharded_storage, tmp_path):
    """statistics.md, section 1, test 2, in its twin that never skips."""
    pixels = tars.load_images(make_place(tiny_experiment(), sharded_storage).data, "test")[0]
    held, spread, error = measure_coverage(torch.from_numpy(pixels).flatten(1).double() / 127.5 - 1, tmp_path)
    assert 89 <= held <= 99 and error == pytest.approx(spread, rel=0.25)
    assert error == pytest.approx(0.0161, rel=0.1), "as measured: other shares than the line's make it wide"


def test_the_estimate_has_the_full_bound_as_its_mean_and_says_how_it_came_about(sampled):
    """One image has no error and says so, and more images than there are is refused."""
    sampled = scoring(sampled, nll_images=None, nll_batch_size=180)
    few = scoring(sampled, nll_timesteps=4)
    assert len([name for name in run_stage(evaluate, few) if "NLL" in name]) == 2
    assert not run_stage(evaluate, few) and len(run_stage(evaluate, sampled)) == 2
    found, full = results(few), results(sampled)
    nll = read_json(few.nll_json, dict)
    for name in ("nll_bpd", "rate_bpd"):
        assert 0 < abs(found["scores"][name] - full["scores"][name]) < 3 * nll["set_se"]
        assert 0 < full["scores"][f"{name}_se"] < found["scores"][f"{name}_se"]
    limits = {"distortion_bpd": 1e-5, "rmse": 1e-5, "prior_bpd": 1e-5, "distortion_bpd_se": 1e-4}
    for name, limit in limits.items():
        assert found["scores"][name] == pytest.approx(full["scores"][name], rel=limit)
    assert np.mean(nll["images"]) == pytest.approx(found["scores"]["nll_bpd"], abs=1e-5)
    protocol = found["protocol"]
    assert "the covariance of all 1,437 training images" in protocol["nll_profile"]
    assert (protocol["nll_timesteps"], full["protocol"]["nll_timesteps"]) == (4, None)
    assert protocol["why_not"] == full["protocol"]["why_not"], "it is as comparable as the full bound"
    with pytest.raises(PipelineError, match="nll_images is 361, but the test split has 360"):
        run_stage(evaluate, scoring(sampled, nll_images=361))
    found = evaluated(one := scoring(sampled, nll_images=1, nll_timesteps=1))["scores"]
    assert found["nll_bpd_se"] is None and found["nll_bpd_se_reason"] == "one image"
    assert read_json(one.nll_json, dict)["set_se"] is None


def test_images_too_large_for_a_covariance_have_a_profile_by_their_gram_matrix(tiny_run, monkeypatch):
    """Its directions are unit vectors, its variances those of images that did not choose them."""
    monkeypatch.setattr(preparations, "LARGEST_GAUSSIAN", 63)
    monkeypatch.setattr(preparations, "GRAM", 64 * 40)
    one_cpu().run_units(preparations.list_gaussian_units(tiny_run), lambda unit: None)
    variances, source = preparations.load_variances(tiny_run)
    assert source == "the Gram matrix of 40 training images" and not preparations.has_covariance(tiny_run)
    images = tars.load_images(tiny_run.data, "train", 0, 40)[0].reshape(40, -1) / 127.5 - 1
    expected = ((images[20:] - images.mean(axis=0)) ** 2).sum(axis=1).mean()
    assert variances.sum().item() == pytest.approx(expected)
    assert (variances[20:] == variances[20]).all() and variances[20] > 0

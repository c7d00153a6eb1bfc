"""Evaluation: scores from units that are kept under what they depend on, never without their protocol."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from staged import asking_for, results, run_stage, scoring, with_weights
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline.scores import classifier, extractors
from pipeline.scores import distances as scores
from pipeline.scores.extractors import find_extractor
from pipeline.scores.image_sets import make_shard_set
from pipeline.stages import evaluate, sample
from pipeline.stages.evaluate.protocol import explain_differences
from pipeline.stages.evaluate.stage import list_samples
from pipeline.store import tars

CPU = torch.device("cpu")
FIDELITY = ("fid", "is")
EVERY = ("fid", "fid_test", "is", "kid", "prc")


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 20)


# FID and IS


@pytest.mark.parametrize("features", ["classifier", "projection"])
def test_scores_stand_with_reference_points_and_protocol(sampled, features):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=FIDELITY, features=features)
    assert not evaluate.STAGE.is_done(run.of(experiment))
    run_stage(evaluate, experiment, run)
    assert evaluate.STAGE.is_done(run.of(experiment))
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
    extractor = find_extractor(run.of(experiment))

    def score(folder, split, n=None):
        images, _ = tars.load_images(folder, split, 0, n)
        return scores.sum_features([extractors.extract_features(extractor, images, CPU)], len(images))

    train = score(run.data, "train").moments.to_statistics()
    drawn, test = score(run.of(experiment).samples, "samples", 12), score(run.data, "test", 12)
    found = results(experiment, run)
    assert found["scores"]["fid"] == pytest.approx(
        scores.compute_fid(drawn.moments.to_statistics(), train), rel=1e-6
    )
    assert found["scores"]["is_mean"] == pytest.approx(drawn.in_order.compute_inception_score()[0], rel=1e-6)
    point = found["reference_points"]["test"]["fid"]
    assert point == pytest.approx(scores.compute_fid(test.moments.to_statistics(), train), rel=1e-6)
    assert found["scores"]["fid"] != pytest.approx(point, rel=0.1)


def merged(images):
    return torch.from_numpy(images.read_features())


@pytest.mark.parametrize("features", ["classifier", "projection"])
def test_all_scores_are_torch_fidelitys_on_the_merged_feature_files(sampled, features):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=EVERY, features=features)
    run_stage(evaluate, experiment, run)
    extractor = find_extractor(run.of(experiment))
    folder = run.data / "references" / "features"
    drawn, train, test = (
        make_shard_set(extractor, shards, (1, 8, 8), place)
        for shards, place in (
            (list_samples(run.of(experiment)), run.score_units),
            (tars.open_shards(run.data).list_shards("train"), folder),
            (tars.open_shards(run.data).list_shards("test"), folder),
        )
    )
    own, real = merged(drawn), merged(train)
    statistics = [fid_features_to_statistics(part.double()) for part in (own, real, merged(test))]
    kid = kid_features_to_metric(own, real, kid_subset_size=6, verbose=False)
    prc = prc_features_to_metric(own, real, verbose=False)
    expected = {
        "fid": fid_statistics_to_metric(*statistics[:2], verbose=False)["frechet_inception_distance"],
        "fid_test": fid_statistics_to_metric(*statistics[::2], verbose=False)["frechet_inception_distance"],
        "kid_mean": kid["kernel_inception_distance_mean"], "kid_std": kid["kernel_inception_distance_std"],
        "precision": prc["precision"], "recall": prc["recall"],
    }  # fmt: skip
    if features == "classifier":
        logits = torch.from_numpy(np.concatenate([part for _, part in drawn.read_chunks()]))
        for name, shuffle in (("is", False), ("is_shuffled", True)):
            found = isc_features_to_metric(logits, shuffle=shuffle)
            expected |= {
                f"{name}_mean": found["inception_score_mean"],
                f"{name}_std": found["inception_score_std"],
            }
    found = results(experiment, run)
    assert found["scores"] == pytest.approx(expected, rel=1e-6)
    assert found["scores"]["fid"] != pytest.approx(found["scores"]["fid_test"], rel=1e-3)
    how, points = found["protocol"], found["reference_points"]
    assert how["kid"] == "100 subsets of 6 images, cubic kernel, seed 2020"
    assert how["prc"] == f"3 neighbours in the features of {extractor.name}, not of VGG-16"
    assert (how["reference_images"], how["fid_test_images"]) == (1437, 360)
    assert {"kid_mean", "recall"} <= points["test"].keys() and "fid_test" not in points["test"]


def test_what_compares_images_finds_its_features_again(sampled):
    """The reference's statistics are kept, and KID needs its images all the same."""
    experiment, run = sampled
    run_stage(evaluate, scoring(experiment, metrics=("fid",), features="projection"), run)
    asked = scoring(experiment, metrics=("kid",), features="projection")
    assert not run_stage(evaluate, asked, run), "all features are on disk"
    assert set(results(asked, run)["scores"]) == {"kid_mean", "kid_std"}


def test_against_the_test_split_the_training_images_are_the_reference_point(sampled):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=("fid",), reference="test")
    run_stage(evaluate, experiment, run)
    found = results(experiment, run)
    assert sorted(found["reference_points"]) == ["gaussian", "noise", "train"]
    assert found["protocol"]["reference_images"] == 360
    assert "reference test, not train" in found["protocol"]["why_not"]


def test_drawing_other_images_makes_the_scores_again(sampled):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=("fid",), features="projection")
    run_stage(evaluate, experiment, run)
    before = results(experiment, run)["scores"]["fid"]
    with_weights(experiment, run, scale=0.5)
    for tar in run.of(experiment).samples.glob("*.tar"):
        tar.unlink()
    run_stage(sample, experiment, run)
    assert not evaluate.STAGE.is_done(run.of(experiment))
    run_stage(evaluate, experiment, run)
    assert results(experiment, run)["scores"]["fid"] != pytest.approx(before, rel=1e-3)


# The protocol

PAPER = {
    "weights": "ema", "n": 50_000, "features": 2048, "sampler": "ancestral", "steps": 1000, "timesteps": 1000,
    "official_extractor": True, "extractor": "inception-v3-compat-6726825d", "reference": "train", "splits": 10,
    "decoder": "tanh", "nll_images": 10_000, "test_images": 10_000,
}  # fmt: skip


def test_the_papers_protocol_is_comparable():
    assert explain_differences(PAPER, ("fid", "is", "nll")) == []


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
    assert any(reason in found for found in explain_differences(PAPER | change, ("fid", "is", "nll")))


def test_what_was_not_scored_is_no_reason():
    assert explain_differences(PAPER | {"n": 16, "official_extractor": False}, ("nll",)) == []
    assert explain_differences(PAPER | {"nll_images": 4}, ("fid",)) == []


def test_looking_whether_it_is_done_loads_no_fidelity_library():
    """`ddpm run` on a run that is up to date takes seconds."""
    code = "import sys, pipeline.stages.evaluate, pipeline.stages.figures; assert 'torch_fidelity' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_size_of_sampling_units_hardly_shows(tiny_run):
    """Other batches round otherwise in the last bits, and now and then a pixel falls on the other side."""
    experiment, run = tiny_run
    with_weights(experiment, run)
    pixels, scored = [], []
    for size in (64, 100):
        asked = asking_for(experiment, num_images=200, batch_size=size)
        asked = scoring(asked, metrics=("fid",), features="projection")
        run_stage(sample, asked, run)
        run_stage(evaluate, asked, run)
        pixels.append(tars.load_images(run.of(asked).samples, "samples", 0, 200)[0])
        scored.append(results(asked, run)["scores"]["fid"])
    equal = (pixels[0] == pixels[1]).mean()
    print(equal, scored)
    assert equal >= 0.999
    assert scored[0] == pytest.approx(scored[1], rel=1e-3)

"""One run of the exact posterior mean of sixteen known images, against arithmetic that no stage computed.

The images are the middles of three digits as red, green and blue, with many levels; the source holds each twice.
"""

import math
import re
import shutil

import numpy as np
import pytest
from conftest import ONE_CPU, blank_charts
from sklearn.datasets import load_digits
from staged import results

from pipeline.cli.program import main
from pipeline.engine.find import find_run, read_place
from pipeline.scores.distances import Moments, compute_fid
from pipeline.scores.extractors import find_extractor
from pipeline.scores.reference import load_reference
from pipeline.stages.figures.nearest import NEIGHBOURS, merge_neighbours
from pipeline.store import tars
from pipeline.store.files import read_json

K, D, SETS = 16, 3 * 4 * 4, 10
WORDS = [
    "name=oracle", "data.source=npy", "data.image_size=4", "data.channels=3", "data.labels=0", f"data.limit={K}",
    "data.images_per_shard=6", "model.name=exact", "train.steps=1", "train.checkpoint_every=1",
    "sample.num_images=2560", "sample.batch_size=2560", "sample.steps=null", "sample.variance=null",
    "evaluate.features=projection", "evaluate.metrics=[fid,kid,nll]", "evaluate.reference=train",
    "evaluate.nll_split=train", "evaluate.nll_images=null", "evaluate.nll_timesteps=null",
    "figures.which=[nearest_pixels,nearest_features,interpolation]",
]  # fmt: skip
DIGITS = np.rint(load_digits().images[:270, 2:6, 2:6] * 255 / 16).astype(np.uint8)
LEVELS = DIGITS + (DIGITS % 255 > 0) * np.arange(16, dtype=np.uint8).reshape(4, 4)  # all but the edges
SOURCE = LEVELS.reshape(3, 90, 4, 4).transpose(1, 2, 3, 0).repeat(2, axis=0)


def ddpm(root, verb, *more):
    data = [f"data.path={root / 'images.npy'}", f"cluster.storage={root}"]
    return main([verb, "digits", *ONE_CPU, *WORDS, *data, *more])


@pytest.fixture(scope="module")
def place(tmp_path_factory, empty_store):
    root = tmp_path_factory.mktemp("oracle")
    shutil.copy(empty_store, root)
    np.save(root / "images.npy", SOURCE)
    with blank_charts():
        assert ddpm(root, "run") == 0
    return read_place(find_run("oracle", root))


@pytest.fixture(scope="module")
def known(place):
    return tars.load_images(place.data, "train")[0]


def find_members(images, known):
    """Return which of the known images (K, C, H, W) each image is, to the bit."""
    equal = (images[:, None] == known).all(axis=(2, 3, 4))
    assert (equal.sum(axis=1) == 1).all()
    return equal.argmax(axis=1)


def test_tars_and_samples_are_the_images_bit_for_bit(place, known):
    members = find_members(known, SOURCE[::2].transpose(0, 3, 1, 2))
    assert len(known) == len(set(members.tolist())) == K
    assert ddpm(place.storage, "shard", "data.limit=91") == 1, "only 90 images differ"
    members = find_members(tars.load_images(place.samples, "samples")[0], known)
    counts, expected = np.bincount(members, minlength=K), len(members) / K
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # chi-square, 15 degrees of freedom, 99.9 %


def test_the_bound_is_the_floor_and_the_choice_of_an_image(place, known):
    """Distortion: 0.50994 bits at an edge value, 1.30567 inside. Rate: Sv of fixedlarge, L_T and log2(K) / D."""
    floor = 0.5099370 + 0.7957282 * ((known > 0) & (known < 255)).mean(axis=(1, 2, 3))
    a = np.prod(1 - np.linspace(1e-4, 0.02, 1000))
    prior = (a * np.square(known / 127.5 - 1).mean() - a - math.log(1 - a)) / 2 / math.log(2)
    scores = results(place)["scores"]
    assert scores["train_distortion_bpd"] == pytest.approx(floor.mean(), abs=1e-4)  # float32
    assert scores["train_prior_bpd"] == pytest.approx(prior, abs=1e-9)
    (file,) = place.score_units.glob("nll-*/*.npz")
    single = np.load(file)["terms"].sum(axis=1, dtype=np.float64) - floor
    error = np.std(single, ddof=1) / math.sqrt(K)
    assert error < math.log2(K) / D / 10
    expected = floor.mean() + 0.48641923 + prior + math.log2(K) / D
    assert scores["train_nll_bpd"] == pytest.approx(expected, abs=0.002 + 3 * error)
    drawn = ["evaluate.metrics=[nll]", "evaluate.nll_timesteps=200"]
    assert ddpm(place.storage, "evaluate", *drawn) == 0
    estimates = [read_json(file, dict) for file in place.path.glob("evaluation/*/nll.json")]
    (estimate,) = (found for found in estimates if found.get("draws") == 200)
    off = np.mean(estimate["images"]) - scores["train_nll_bpd"]
    assert 0 < abs(off) < 3 * estimate["set_se"] < 0.1


def test_the_fid_falls_as_one_over_n(place):
    """Its expectation from the sixteen features: (tr S + a/2 sum_ij Var(z_i z_j) / (l_i + l_j)) / n + (1 - a)^2 tr S.

    S, l: their covariance (over K, not K - 1) and its eigenvalues; z: the features along its axes; a^2 = K / (K - 1),
    by which the reference's covariance is larger.
    """
    extractor = find_extractor(place)

    def read_features(folder, shards):
        files = (folder / extractor.name / f"{shard.sha256[:16]}.npz" for shard in shards)
        return np.concatenate([np.load(file)["features"] for file in files]).astype(np.float64)

    known = read_features(place.reference_features, tars.open_shards(place.data).list_shards("train"))
    drawn = read_features(place.score_units, tars.open_shards(place.samples).list_shards("samples"))
    z = known - known.mean(axis=0)
    values, axes = np.linalg.eigh(z.T @ z / K)
    z, values = (z @ axes)[:, 1 - K :], values[1 - K :]
    spread, a = (z**2).T @ z**2 / K - np.diag(values**2), math.sqrt(K / (K - 1))
    expected = values.sum() + a / 2 * (spread / (values[:, None] + values)).sum()
    reference, limit = load_reference(place, extractor, "train"), (1 - a) ** 2 * values.sum()
    whole = len(drawn) * (results(place)["scores"]["fid"] - limit)
    for n in (64, 128, 256):
        parts = [Moments.from_features(p).to_statistics() for p in drawn[: SETS * n].reshape(SETS, n, -1)]
        found = [n * (compute_fid(part, reference) - limit) for part in parts]
        spread = np.std(found, ddof=1)  # 3.7: 99.5 % of Student's t with nine degrees of freedom
        assert np.mean(found) == pytest.approx(expected, abs=3.7 * spread / math.sqrt(SETS)), n
        assert whole == pytest.approx(expected, abs=3.7 * spread), n


def test_figures_show_the_images_and_the_report_the_scores(place, known):
    shown = tars.load_images(place.samples, "samples", 0, place.experiment.figures.images)[0]
    found = [merge_neighbours(sorted(folder.iterdir())) for folder in place.figure_units.glob("nearest-*")]
    for nearest in found:
        assert (nearest["distance"][:, 0] == 0).all() and np.array_equal(nearest["images"][:, 0], shown)
    apart = np.linalg.norm((shown[:, None] - known.astype(float)).reshape(len(shown), K, D), axis=2)
    expected = np.sort(apart, axis=1)[:, :NEIGHBOURS]
    assert [np.allclose(nearest["distance"], expected, rtol=1e-5) for nearest in found].count(True) == 1
    for file in place.figure_units.glob("mixed-*/*.npz"):
        find_members(np.load(file)["images"][0], known)

    page = place.report_html.with_suffix(".md").read_text()
    row = re.search(r"NLL, training set, bits/dim \| ≤\s([\d.]+)", page)
    assert row and float(row[1]) == pytest.approx(results(place)["scores"]["train_nll_bpd"], abs=6e-4)
    assert "images not known to be CIFAR-10's" in results(place)["protocol"]["why_not"]

"""One run of the exact posterior mean of sixteen known images, against arithmetic that no stage computed.

The images are the middles of three digits as red, green and blue; the source holds each twice.
"""

import math
import re
import shutil

import numpy as np
import pytest
from conftest import ONE_CPU
from sklearn.datasets import load_digits

from pipeline.cli.program import main
from pipeline.engine.find import find_run, read_place
from pipeline.scores.distances import Moments, compute_fid
from pipeline.scores.extractors import find_extractor
from pipeline.scores.reference import load_reference
from pipeline.store import tars
from pipeline.store.files import read_json
from pipeline.store.run import Place

K, D, SETS = 16, 3 * 4 * 4, 10
WORDS = [
    "name=oracle", "data.source=npy", "data.image_size=4", "data.channels=3", "data.labels=0", f"data.limit={K}",
    "model.name=exact", "train.steps=1", "train.checkpoint_every=1", "sample.num_images=5120",
    "sample.batch_size=2560", "sample.steps=null", "sample.variance=null", "evaluate.features=projection",
    "evaluate.metrics=[fid,kid,nll]", "evaluate.nll_split=train", "evaluate.nll_images=null",
    "evaluate.reference=train", "evaluate.nll_timesteps=null",
    "figures.which=[nearest_pixels,nearest_features,interpolation]",
]  # fmt: skip


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    digits = np.rint(load_digits().images[:270, 2:6, 2:6] * 255 / 16).astype(np.uint8)
    return digits.reshape(3, 90, 4, 4).transpose(1, 2, 3, 0).repeat(2, axis=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory, source, empty_store) -> Place:
    root = tmp_path_factory.mktemp("oracle")
    shutil.copy(empty_store, root)
    np.save(root / "images.npy", source)
    data = [f"data.path={root / 'images.npy'}", f"cluster.storage={root}"]
    assert main(["run", "digits", *ONE_CPU, *WORDS, *data]) == 0
    return read_place(find_run("oracle", root))


@pytest.fixture(scope="module")
def known(place) -> np.ndarray:
    return tars.load_images(place.data, "train")[0]


@pytest.fixture(scope="module")
def scores(place) -> dict[str, float]:
    return read_json(place.metrics_json, dict)["scores"]


def find_members(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return which of the known images (K, C, H, W) each image is, to the bit."""
    equal = (images[:, None] == known).all(axis=(2, 3, 4))
    assert (equal.sum(axis=1) == 1).all()
    return equal.argmax(axis=1)


def test_the_tars_hold_different_images_of_the_source_bit_for_bit(known, source):
    assert known.shape == (K, 3, 4, 4)
    written = source[::2].transpose(0, 3, 1, 2)
    assert len(set(find_members(known, written).tolist())) == K


def test_more_images_than_differ_are_refused(place, capsys):
    words = [*WORDS, f"data.path={place.experiment.data.path}", f"cluster.storage={place.storage}"]
    assert main(["shard", "digits", *ONE_CPU, *words, "data.limit=91"]) == 1
    assert "data.limit is 91, but only 90 training images differ; lower it" in capsys.readouterr().err


def test_samples_are_the_images_each_as_often(place, known):
    members = find_members(tars.load_images(place.samples, "samples")[0], known)
    counts, expected = np.bincount(members, minlength=K), len(members) / K
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # chi-square, 15 degrees of freedom, 99.9 %


def test_the_bound_is_the_floor_and_the_choice_of_an_image(place, known, scores):
    """NLL = distortion + rate: 0.50994 bits at an edge value and 1.30567 inside; Sv + L_T + log2(K) / D."""
    inside = ((known > 0) & (known < 255)).mean(axis=(1, 2, 3))
    floor = 0.5099370 + 0.7957282 * inside
    alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000))
    prior = (
        (alpha_bar * np.square(known / 127.5 - 1).mean() - alpha_bar - math.log(1 - alpha_bar))
        / 2
        / math.log(2)
    )
    assert scores["train_distortion_bpd"] == pytest.approx(floor.mean(), abs=1e-4)  # float32
    assert scores["train_prior_bpd"] == pytest.approx(prior, abs=1e-9)
    (file,) = place.score_units.glob("nll-*/*.npz")
    unit = np.load(file)
    single = unit["terms"].sum(axis=1, dtype=np.float64) + unit["prior"]
    error = np.std(single - floor, ddof=1) / math.sqrt(K)
    assert error < 0.005 < math.log2(K) / D / 10
    expected = floor.mean() + 0.48641923 + prior + math.log2(K) / D
    assert scores["train_nll_bpd"] == pytest.approx(expected, abs=0.002 + 3 * error)


def test_the_fid_falls_as_one_over_n(place, scores):
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
    for n in (128, 256, 512):
        parts = [
            Moments.from_features(part).to_statistics() for part in drawn[: SETS * n].reshape(SETS, n, -1)
        ]
        found = [n * (compute_fid(part, reference) - limit) for part in parts]
        error = np.std(found, ddof=1) / math.sqrt(SETS)
        assert np.mean(found) == pytest.approx(expected, abs=3.7 * error), n  # 99.5 % of Student's t
        assert len(drawn) * (scores["fid"] - limit) == pytest.approx(
            expected, abs=3.7 * error * math.sqrt(SETS)
        ), n
    assert abs(scores["kid_mean"]) < 3 * scores["kid_std"]


def test_figures_show_the_images(place, known):
    nearest = [np.load(file) for file in place.figure_units.glob("nearest-*/*.npz")]
    assert len(nearest) == 2 and all((unit["distance"][:, 0] == 0).all() for unit in nearest)
    for file in place.figure_units.glob("mixed-*/*.npz"):
        find_members(np.load(file)["images"][0, 1:-1], known)  # between the two sources


def test_the_report_prints_the_scores(place, scores):
    page = place.report_html.with_suffix(".md").read_text()
    row = re.search(r"NLL, training set, bits/dim \| ≤\s([\d.]+)", page)
    assert row and float(row[1]) == pytest.approx(scores["train_nll_bpd"], abs=6e-4)
    assert "| Reference images | 16 |" in page and "| Images in the NLL | 16 |" in page
    protocol = read_json(place.metrics_json, dict)["protocol"]
    assert not protocol["comparable"] and "images not known to be CIFAR-10's" in protocol["why_not"]

"""Standard errors, by brute force and by a spread that is known, and the order of runs that they allow."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kernel_poly

from pipeline.scores import distances, jackknife
from pipeline.scores.metrics import METRICS, find_metric
from pipeline.scores.ranking import describe_best, explain_ranks, format_difference, rank_runs


class Features:
    def __init__(self, features, classes=0):
        self.features, self.n = features.astype(np.float32), len(features)
        self.logits = 3 * self.features[:, :classes]

    def read_chunks(self):
        return zip(np.array_split(self.features, 3), np.array_split(self.logits, 3), strict=True)

    def read_features(self):
        return self.features


def moments_of(features):
    return distances.Moments.from_features(features)


def statistics_of(features):
    return moments_of(features).to_statistics()


def test_each_score_without_a_group_is_that_of_the_others_alone():
    draw = np.random.default_rng(0)
    images, real = Features(draw.normal(size=(103, 6)), 5), draw.normal(0.4, 1.2, (90, 6)).astype(np.float32)
    member = np.arange(103) * 4 // 103
    whole, target = moments_of(images.features), distances.Reference({"fid": statistics_of(real)}, None, 1.0)
    sums = jackknife.recompute_fid(images, member, whole, target) | jackknife.recompute_is(images, member)
    kid = jackknife.recompute_kid(images.features, real, member)
    precision, recall = jackknife.recompute_precision_recall(images.features, real, member)
    true_kid = []
    for group in range(4):
        rest = Features(images.features[member != group], 5)
        fid = distances.compute_fid(statistics_of(rest.features), statistics_of(real))
        assert sums["fid"][group] == pytest.approx(fid)
        found = distances.compute_precision_recall(rest.features, real)
        assert (precision[group], recall[group]) == pytest.approx(found, rel=1e-6)
        p = torch.from_numpy(rest.logits).double().softmax(1).numpy()
        parts = [p[i * len(p) // 10 : (i + 1) * len(p) // 10] for i in range(10)]
        inception = [np.exp((x * np.log(x / x.mean(axis=0))).sum(axis=1).mean()) for x in parts]
        assert sums["is_mean"][group] == pytest.approx(np.mean(inception), rel=1e-9)
        n, x = len(rest.features), kernel_poly(rest.features, rest.features)
        pairs = (x.sum() - np.trace(x)) / (n * (n - 1))
        true_kid.append(pairs - 2 * kernel_poly(rest.features, real).mean())
    assert kid == pytest.approx(true_kid, rel=1e-5)
    target, others = distances.Reference({}, real, 1.0), {"kid_mean": 0.0, "kid_std": 3.0}
    found = jackknife.compute_errors(images, 4, whole, target, others)
    assert found["kid_mean"] == pytest.approx(np.hypot(jackknife.compute_jackknife_error(kid), 0.3))


def test_the_error_of_the_fid_is_its_spread_over_repeats_and_covers_its_mean():
    """64 Gaussian features, n = 1,000, 20 groups, 80 repeats; the spread in closed form (first order) is 0.199."""
    draw, n, width, shift, scale = np.random.default_rng(1), 1000, 64, 0.47, 0.8
    of_means, of_variances = 4 * (shift * scale) ** 2, 2 * scale**4 * (1 - 1 / scale) ** 2
    spread = (width * (of_means + of_variances) / n) ** 0.5
    reference = distances.Statistics(None, np.zeros(width), np.eye(width))
    target, fids, errors = distances.Reference({"fid": reference}, None, 1.0), [], []
    for _ in range(80):
        images = Features(draw.normal(shift, scale, (n, width)))
        fids.append(distances.compute_fid(statistics_of(images.features), reference))
        errors.append(jackknife.compute_errors(images, 20, moments_of(images.features), target, {})["fid"])
    covered = np.mean(np.abs(np.array(fids) - np.mean(fids)) < 1.96 * np.array(errors))
    assert np.std(fids) == pytest.approx(spread, rel=0.2)
    assert np.mean(errors) == pytest.approx(spread, rel=0.05)
    assert 0.88 <= covered <= 0.99


FID = METRICS["fid"]


@dataclass(frozen=True)
class Place:
    label: str
    swept: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    data: str = "digits"
    image_bounds: tuple = (0, ())


def run(lr: float, seed: int, fid: float | None, n: int = 64, data: str = "digits") -> Place:
    scores, protocol = {} if fid is None else {"fid": fid}, {"n": n, "sampler": str(seed)}
    return Place(f"lr={lr} seed={seed}", {"lr": lr, "seed": seed}, scores, protocol, data)


def ranks(runs: list[Place], metric=FID) -> list[list[tuple[str, str]]]:
    return [[(point.name, point.rank) for point in group.points] for group in rank_runs(runs, metric)]


def test_seeds_are_one_row_with_their_spread():
    fids = {(1, 0): 10.0, (1, 1): 40.0, (2, 0): 20.0, (2, 1): 24.0, (2, 2): 22.0, (3, 0): None}
    runs = [run(*words, fid) for words, fid in fids.items()]
    (group,) = rank_runs(runs, FID)
    found = [(point.name, point.rank, point.mean, len(point.runs)) for point in group.points]
    assert found == [("lr=2", "1-2", 22.0, 3), ("lr=1", "1-2", 25.0, 2)]
    assert group.points[0].error == pytest.approx(2)
    found = describe_best([group], FID).replace("\u00a0", " ")
    assert found.startswith("lr=2 has the lowest FID of 2: 22.0 ± 2.0, mean of 3 seeds; 1 of the others")
    assert "two seeds give no usable interval (t = 12.7)" in explain_ranks(group.points)
    apart = rank_runs([run(4, seed, 200.0 + seed) for seed in range(3)] + runs, FID)[0]
    assert [point.rank for point in apart.points] == ["1-2", "1-2", "3"]
    near = [run(lr, seed, 7.0 + 3 * lr + seed) for lr in (1, 2) for seed in range(3)]
    assert [rank for _, rank in ranks(near)[0]] == ["1", "2"], "the error of a mean over seeds is s / sqrt(3)"


@pytest.mark.parametrize(("rows", "groups", "expected"), [
    ([(10.0, 1.0), (11.0, 1.0), (16.0, 1.0)], 20, "a 1-2, b 1-2, c 3"),  # other sampling seeds; 5 errors worse
    ([(16.0, 1.0), (15.0, 1.0), (10.0, 1.0)], 20, "c 1, b 2-3, a 2-3"),
    ([(10.0, 1.0), (16.0, 1.0)], 2, "a 1-2, b 1-2"),  # two groups say little
    ([(10.0, 0.1), (12.0, 0.1), (13.0, 9.0)], 20, "a 1-2, b 3, c 1-2"),  # by value; the rank stands beside it
    ([(10.0, 1.0), (13.0, 1.0)], 20, "a 1, b 2"),
    ([(10.0, 1.0), *[(13.0 + i / 100, 1.0) for i in range(4)]], 20, "a 1-5, b 1-5, c 1-5, d 1-5, e 1-5"),  # Holm
    ([(5.0, None), (5.0, None), (6.0, None)], 20, "a 1-2, b 1-2, c 3"),  # of an older version
    ([(5.0, None), (5.1, 1.0)], 20, "a 1, b 2"),
])  # fmt: skip
def test_rows_that_their_errors_cannot_tell_from_the_best_share_a_rank(rows, groups, expected):
    how, named = {"jackknife_groups": groups}, zip("abcde", rows, strict=False)
    runs = [Place(name, {"x": name}, {"fid": fid, "fid_se": error}, how) for name, (fid, error) in named]
    for its in (runs, runs[::-1]):
        assert ", ".join(f"{name} {rank}" for name, rank in ranks(its)[0]) == expected


def test_bounds_of_the_same_images_and_noise_are_compared_image_by_image():
    """Each NLL has an error of 0.1, their difference one of 0.001; with other noise the errors count."""
    images = np.random.default_rng(0).normal(4, 1, 100)

    def bounded(label: str, seed: int, shift: float) -> Place:
        bounds = images + np.random.default_rng(ord(label)).normal(shift, 0.01, 100)
        scores = {"nll_bpd": bounds.mean(), "nll_bpd_se": bounds.std() / 10}
        return Place(label, {"x": label}, scores, {"nll_images": 100}, "digits", (seed, bounds))

    metric = METRICS["nll_bpd"]
    (group,) = rank_runs([bounded("a", 0, 0.0), bounded("b", 0, 0.01), bounded("c", 1, 0.02)], metric)
    assert [(point.name, point.rank) for point in group.points] == [("a", "1-2"), ("b", "3"), ("c", "1-2")]
    errors = [point.difference.error for point in group.points[1:]]
    assert 0.0005 < errors[0] < 0.002 and 0.1 < errors[1] < 0.2
    assert format_difference(group.points[2], metric).startswith("+0.02\u00a0±\u00a00.1")


def test_other_images_and_other_protocols_are_groups_of_their_own():
    runs = [run(1, 0, 9.0), run(2, 0, 8.0), run(3, 0, 1.0, n=9), run(4, 0, 2.0, data="cifar10")]
    assert [len(group.points) for group in rank_runs(runs, FID)] == [2, 1, 1]
    assert "scored by 3 protocols" in describe_best(rank_runs(runs, FID), FID)
    assert "No run has a score of FID" in describe_best([], FID)


def test_a_metric_is_found_by_name_or_family_and_has_its_direction():
    found = [find_metric(word) for word in ("is", "kid_mean", "nope")]
    assert found == [METRICS["is_mean"], METRICS["kid_mean"], None]
    runs = [Place("a", {"x": 1}, {"is_mean": 1.0}), Place("b", {"x": 2}, {"is_mean": 2.0})]
    assert ranks(runs, METRICS["is_mean"]) == [[("b", "1"), ("a", "2")]]
    assert ranks(runs, replace(METRICS["is_mean"], larger_is_better=False)) == [[("a", "1"), ("b", "2")]]

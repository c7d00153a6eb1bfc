"""Standard errors: the jackknife against brute force and against a spread that is known, and how they are written."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kernel_poly

from pipeline.scores import distances, jackknife


class Features:
    """An image set in memory."""

    def __init__(self, features, classes=0):
        self.features, self.n = features.astype(np.float32), len(features)
        self.logits = 3 * self.features[:, :classes]

    def read_chunks(self):
        return zip(np.array_split(self.features, 3), np.array_split(self.logits, 3), strict=True)

    def read_features(self):
        return self.features

    def without(self, left_out):
        return Features(self.features[~left_out], self.logits.shape[1])


def moments_of(features):
    return distances.Moments.from_features(features)


def statistics_of(features):
    return moments_of(features).to_statistics()


def test_each_score_without_a_group_is_that_of_the_others_alone():
    draw = np.random.default_rng(0)
    images, real = Features(draw.normal(size=(103, 6)), 5), draw.normal(0.4, 1.2, (90, 6)).astype(np.float32)
    member = np.arange(103) * 4 // 103
    whole, target = moments_of(images.features), distances.Target({"fid": statistics_of(real)}, None, 1.0)
    sums = jackknife.leave_out_fid(images, member, whole, target) | jackknife.leave_out_is(images, member)
    kid = jackknife.leave_out_kid(images.features, real, member)
    precision, recall = jackknife.leave_out_precision_recall(images.features, real, member)
    true_kid = []
    for group in range(4):
        rest = images.without(member == group)
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
    target, others = distances.Target({}, real, 1.0), {"kid_mean": 0.0, "kid_std": 3.0}
    found = jackknife.compute_errors(images, 4, whole, target, others)
    assert found["kid_mean"] == pytest.approx(np.hypot(jackknife.compute_jackknife_error(kid), 0.3))


def test_the_error_of_the_fid_is_its_spread_over_repeats_and_covers_its_mean():
    """64 Gaussian features, n = 1,000, 20 groups, 80 repeats; the spread in closed form (first order) is 0.199."""
    draw, n, width, shift, scale = np.random.default_rng(1), 1000, 64, 0.47, 0.8
    of_means, of_variances = 4 * (shift * scale) ** 2, 2 * scale**4 * (1 - 1 / scale) ** 2
    spread = (width * (of_means + of_variances) / n) ** 0.5
    reference = distances.Statistics(None, np.zeros(width), np.eye(width))
    target, fids, errors = distances.Target({"fid": reference}, None, 1.0), [], []
    for _ in range(80):
        images = Features(draw.normal(shift, scale, (n, width)))
        fids.append(distances.compute_fid(statistics_of(images.features), reference))
        errors.append(jackknife.compute_errors(images, 20, moments_of(images.features), target, {})["fid"])
    covered = np.mean(np.abs(np.array(fids) - np.mean(fids)) < 1.96 * np.array(errors))
    assert np.std(fids) == pytest.approx(spread, rel=0.2)
    assert np.mean(errors) == pytest.approx(spread, rel=0.05)
    assert 0.88 <= covered <= 0.99

import math

import pytest
import torch

from ddpm import rng
from ddpm.rng import Stream

ROWS = torch.arange(128)
IMAGE = (3, 32, 32)


@pytest.mark.parametrize("counter, key, expected", [
    # the known-answer file of Random123, philox4x32 with 10 rounds
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
])  # fmt: skip
def test_philox_known_answers(counter, key, expected):
    words, (k0, k1), answer = ([int(word, 16) for word in row.split()] for row in (counter, key, expected))
    tensors = [torch.tensor([word]) for word in words]
    assert [int(word) for word in rng.run_philox(tensors, k1 << 32 | k0)] == answer
    assert list(rng.run_philox(words, k1 << 32 | k0)) == answer


def kolmogorov_distance(values: torch.Tensor, cdf) -> float:
    ordered = values.flatten().double().sort().values
    below = torch.arange(len(ordered)) / len(ordered)
    return float((cdf(ordered) - below).abs().max())


def test_normal_has_the_normal_distribution_beyond_six_sigma():
    z = rng.draw_normal(1, Stream.NOISE, 5, torch.arange(1000), (1000,)).double()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * (variance / n) ** 0.5
    assert kolmogorov_distance(z, torch.special.ndtr) < 1.95 / n**0.5  # 0.1 % level
    for sigma in (2, 3, 4):
        expected = n * math.erfc(sigma / 2**0.5)
        assert abs((z.abs() > sigma).sum() - expected) < 5 * expected**0.5
    words = torch.tensor([0, 1, 2**32 - 1]).repeat_interleave(3)
    z = torch.stack(rng._convert_to_normal(words, torch.tensor([0, 2**31, 2**32 - 1]).repeat(3)))
    assert z.isfinite().all()
    assert 6.6 < z.abs().max() < 6.7


def test_uniform_numbers_and_integers_are_uniform():
    u = rng.draw_uniform(1, Stream.FLIP, 0, torch.arange(1000), (500,))
    assert u.min() >= 0 and u.max() < 1
    assert kolmogorov_distance(u, lambda x: x) < 1.95 / u.numel() ** 0.5
    draws = rng.draw_integers(3, Stream.TIMESTEP, 9, torch.arange(100_000), 10)
    counts = torch.bincount(draws, minlength=10).double()
    assert len(counts) == 10
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 33.7  # chi-squared, 9 degrees, 0.01 %
    assert rng.draw_integers(3, Stream.TIMESTEP, 9, ROWS, 1).eq(0).all()
    with pytest.raises(ValueError, match="high"):
        rng.draw_integers(3, Stream.TIMESTEP, 9, ROWS, 0)
    with pytest.raises(ValueError, match="index must be int64"):
        rng.draw_normal(1, Stream.NOISE, 0, torch.zeros(3), (2,))


def test_permutation_is_a_permutation_without_order():
    order = rng.draw_permutation(1, Stream.ORDER, 0, 50_000)
    assert torch.equal(order.sort().values, torch.arange(50_000))
    ranks = torch.stack([order.double(), torch.arange(50_000).double()])
    assert abs(torch.corrcoef(ranks)[0, 1]) < 5 / 50_000**0.5
    assert not torch.equal(order, rng.draw_permutation(1, Stream.ORDER, 1, 50_000))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 192])
def test_a_row_depends_on_its_index_alone(count):
    rows = torch.tensor([5, 40, 2**32 - 1, 0, 41])
    together = rng.draw_normal(9, Stream.X_T, 3, rows, (count,))
    for i in range(len(rows)):
        assert torch.equal(together[i : i + 1], rng.draw_normal(9, Stream.X_T, 3, rows[i : i + 1], (count,)))
    reversed_rows = rng.draw_normal(9, Stream.X_T, 3, rows.flip(0), (count,))
    assert torch.equal(reversed_rows.flip(0), together)
    assert torch.equal(rng.draw_normal(9, Stream.X_T, 3, rows, (count + 5,))[:, :count], together), "a prefix"


@pytest.mark.parametrize("other", [
    (2, Stream.NOISE, 7, 0), (1, Stream.REVERSE, 7, 0), (1, Stream.NOISE, 8, 0), (1, Stream.NOISE, 7, 1),
    (1 + 2**32, Stream.NOISE, 7, 0),
], ids=["seed", "stream", "step", "index", "high word of the seed"])  # fmt: skip
def test_seed_stream_step_and_index_are_independent(other):
    seed, stream, step, shift = other
    a = rng.draw_normal(1, Stream.NOISE, 7, ROWS, IMAGE).flatten()
    b = rng.draw_normal(seed, stream, step, ROWS + shift, IMAGE).flatten()
    assert not (a == b).float().mean() > 1e-3
    for x, y in ((a, b), (a**2, b**2)):
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 5 / len(a) ** 0.5

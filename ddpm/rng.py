"""Counter-based random numbers: every draw is a function of (seed, stream, step, index).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer tensor operations. The
key is the 64-bit seed, the counter is (block, index, step, stream). So row i of a draw depends on index[i] alone,
whatever the batch, the worker or the device. Words are equal everywhere, normals up to the last bits of log and sin.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

Word = int | Tensor  # 32 unsigned bits, in an int or an int64 tensor
Words = tuple[Tensor, Tensor, Tensor, Tensor]  # four words of each block, int64 (N, blocks)

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Stream(IntEnum):
    """Purpose of a random number; each purpose has its own numbers. Never renumber: results depend on the values."""

    ORDER = 0  # order of the images in an epoch
    TIMESTEP = 1  # t of a training image
    NOISE = 2  # eps of a training image
    FLIP = 3  # horizontal flips
    DROPOUT = 4
    NETWORK = 5  # initial weights
    LABEL = 6  # label dropout
    X_T = 7  # start of the reverse chain
    REVERSE = 8  # z of each reverse step
    NLL = 9  # noise of the likelihood bound
    FIGURES = 10
    BASELINE = 11  # reference points of the scores
    PROJECTION = 12  # random-projection features
    CLASSIFIER = 13  # the classifier whose features score labelled sets
    BOUND_TIMESTEP = 14  # t of the likelihood bound, if not all are evaluated


def run_philox(counter: tuple[Word, Word, Word, Word], seed: int) -> tuple[Word, Word, Word, Word]:
    """Map four counter words (they broadcast) and a 64-bit key to four random words by Philox4x32-10.

    A product of two words needs all 64 bits of an int64, so it wraps to negative values; only the bits matter. Its
    lower word is c1 or c3 of the next round, where the upper bits do no harm.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, seed >> 32 & MASK
    for _ in range(ROUNDS):
        product0, product2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((product2 >> 32) ^ c1 ^ k0) & MASK, product2
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & MASK, product0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def draw_blocks(seed: int, step: Word, index: Tensor, counts: dict[Stream, int]) -> dict[Stream, Words]:
    """Draw at least `counts` words of each stream for each row, all by one run of Philox.

    index: int64 (N,), each below 2**32; the words are on its device. The functions `to_*` turn words into numbers.
    """
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index must be int64 (N,), got {index.dtype} of shape {tuple(index.shape)}")
    sizes, device = [-(-count // 4) for count in counts.values()], index.device
    blocks = [torch.arange(size, device=device) for size in sizes]
    streams = [torch.full((n,), int(stream), device=device) for stream, n in zip(counts, sizes, strict=True)]
    block, stream = (torch.cat(parts)[None, :] for parts in (blocks, streams))
    words = run_philox((block, index[:, None] & MASK, step & MASK, stream), seed)
    split = (word.split(sizes, dim=1) for word in words)  # type: ignore[union-attr]  # two counter words are tensors
    return dict(zip(counts, zip(*split, strict=True), strict=True))


def draw_normal(seed: int, stream: Stream, step: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normals, float32 (N, *shape); by Box-Muller, |z| up to 6.66.

    All functions here take the arguments of `draw_blocks`.
    """
    return to_normal(_draw_stream_words(seed, stream, step, index, math.prod(shape)), shape)


def to_normal(words: Words, shape: tuple[int, ...]) -> Tensor:
    a, b, c, d = words
    return _join_words([*_convert_to_normal(a, b), *_convert_to_normal(c, d)], shape)


def draw_uniform(seed: int, stream: Stream, step: int, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Draw uniform numbers in [0, 1), multiples of 2**-24, float32 (N, *shape)."""
    return to_uniform(_draw_stream_words(seed, stream, step, index, math.prod(shape)), shape)


def to_uniform(words: Words, shape: tuple[int, ...] = ()) -> Tensor:
    return _join_words([(word >> 8).float() * 2.0**-24 for word in words], shape)


def draw_words(seed: int, stream: Stream, step: int, index: Tensor, count: int) -> Tensor:
    """Draw words of 32 random bits, int32 (N, count)."""
    return to_words(_draw_stream_words(seed, stream, step, index, count), count)


def to_words(words: Words, count: int) -> Tensor:
    return _join_words([(word - 2**31).int() for word in words], (count,))


def draw_integers(seed: int, stream: Stream, step: int, index: Tensor, high: int) -> Tensor:
    """Draw integers in 0..high-1, int64 (N,); the bias of the remainder is below high / 2**63."""
    if high < 1:
        raise ValueError(f"integers: high must be at least 1, got {high}")
    return to_integers(_draw_stream_words(seed, stream, step, index, 1), high)


def to_integers(words: Words, high: int) -> Tensor:
    a, b, _, _ = words
    return ((a >> 1 << 32 | b) % high)[:, 0]


def draw_permutation(
    seed: int, stream: Stream, step: int, n: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw a random order of 0..n-1, int64 (n,) on `device`: the argsort of 64-bit keys, one per index."""
    a, b, _, _ = _draw_stream_words(seed, stream, step, torch.arange(n, device=device), 1)
    return torch.argsort(((a - 2**31) * 2**32 + b)[:, 0], stable=True)


def draw_torch_seed(seed: int, stream: int, step: int, index: int) -> int:
    """Draw a 63-bit seed for torch's own generators, where torch draws the numbers (dropout, initial weights)."""
    a, b, _, _ = run_philox((0, index & MASK, step & MASK, int(stream)), seed)
    return int(a) >> 1 << 32 | int(b)


def _draw_stream_words(seed: int, stream: Stream, step: int, index: Tensor, count: int) -> Words:
    return draw_blocks(seed, step, index, {stream: count})[stream]


def _convert_to_normal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Turn two words into two independent standard normals. a + 1 > 0 keeps the logarithm finite."""
    radius = torch.sqrt(-2 * torch.log((a + 1).float() * 2.0**-32))
    angle = (b - 2**31).float() * (math.pi * 2.0**-31)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _join_words(values: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Join four (N, blocks) tensors to (N, *shape), block by block: a shorter row is a prefix of a longer one."""
    flat = torch.stack(values, dim=-1).flatten(1)
    return flat[:, : math.prod(shape)].reshape(len(flat), *shape)

"""The variational bound on the negative log likelihood, in bits/dim (paper, Eq. 5 and Sec. 4.3).

Arithmetic is in the type of the images, results are float64. An image's bound is the sum of its T terms
(index 0 is L_0, the decoder; index i >= 1 is the paper's L_i) and its prior L_T.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm.config import Decoder, Variance
from ddpm.diffusion import Diffusion, Network
from ddpm.gaussians import average_per_image, compute_normal_kl
from ddpm.rng import Stream, draw_words


@dataclass(frozen=True)
class BoundTerms:
    """Terms of the bound, per image; float64.

    terms (N, K) bits/dim and mse (N, K) of the x_0 estimate, in units of [-1, 1] squared, at the K timesteps;
    prior (N,) bits/dim. K < T if only some timesteps are evaluated. timesteps is (K,), or (N, K) if each image has its
    own.
    """

    timesteps: Tensor
    terms: Tensor
    mse: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """The bound (N,), bits/dim. Raises ValueError if timesteps are missing."""
        self._require_all_timesteps()
        return self.terms.sum(dim=1) + self.prior

    def _require_all_timesteps(self) -> None:
        if not torch.equal(self.timesteps, torch.arange(len(self.timesteps))):
            raise ValueError("the bound sums all timesteps and this result holds only some")


def compute_prior(diffusion: Diffusion, x_0: Tensor) -> Tensor:
    """Return L_T of Eq. 5 per image (N,): KL of q(x_T | x_0) from the standard normal, bits/dim."""
    last = torch.full((len(x_0),), len(diffusion) - 1, device=x_0.device)
    mean, _, log_variance = diffusion.q_mean_variance(x_0, last)
    zero = torch.zeros((), dtype=x_0.dtype, device=x_0.device)
    return average_per_image(compute_normal_kl(mean, log_variance, zero, zero)) / math.log(2)


@torch.no_grad()
def compute_bits_per_dim(
    diffusion: Diffusion, net: Network, x_0: Tensor, noise: Callable[[int, Tensor], Tensor] | None = None, *,
    timesteps: Sequence[int] | Tensor | None = None, batch_size: int | None = None, decoder: Decoder = "tanh",
    clip: bool = True, variance: Variance | None = None, context: Tensor | None = None,
) -> BoundTerms:  # fmt: skip
    """Compute the bound for images x_0 (N, C, H, W), grey levels scaled to [-1, 1], on the device of x_0.

    noise(t, rows) gives a fresh standard normal draw like x_0[rows] for a timestep; None: torch's. net must be in
    evaluation mode; any denoise(x_t, t) -> x_0 is a network with predict="x0". timesteps: None for all; (K,); or int64
    (N, K), where each image has its own, and one that it has twice is computed once. batch_size: the images of a
    network call, by default N. clip and variance as in Diffusion.p_mean_variance.
    """
    if len(diffusion) != diffusion.config.timesteps:
        raise ValueError("the bound is defined on the full chain, not on a respaced one")
    if not bool((x_0.abs() <= 1).all()):  # nor nan
        raise ValueError("the bound is defined for images in [-1, 1]: see ddpm.images.from_uint8")
    diffusion, n = diffusion.to(x_0.device), len(x_0)
    # Timesteps and rows, ascending; in numpy too, so that the host knows them without asking the device.
    chosen = np.asarray(range(len(diffusion)) if timesteps is None else timesteps)
    pairs, position = np.unique(chosen * n + np.arange(n)[:, None], return_inverse=True)
    terms, mse, size = [], [], batch_size or n
    noise = noise or (lambda t, rows: torch.randn_like(x_0[rows]))
    for number, pair in enumerate(torch.from_numpy(pairs).to(x_0.device).split(size)):
        t, rows = pair // n, pair % n
        x = x_0[rows]
        steps, counts = np.unique(pairs[size * number :][:size] // n, return_counts=True)
        each = zip(steps.tolist(), rows.split(counts.tolist()), strict=True)
        eps = torch.cat([noise(step, its_rows) for step, its_rows in each])
        x_t = diffusion.q_sample(x, t, eps)
        labels = () if context is None else (context[rows],)
        reverse = diffusion.p_mean_variance(net(x_t, t, *labels), x_t, t, clip, variance)
        terms.append(diffusion.compute_bound_terms(reverse, x, x_t, t, decoder))
        mse.append(average_per_image((reverse.x_0 - x) ** 2))
    both = torch.stack((torch.cat(terms).double(), torch.cat(mse).double())).cpu()[:, position]
    return BoundTerms(
        torch.from_numpy(chosen),
        both[0],
        both[1],
        compute_prior(diffusion, x_0.double()).cpu(),  # in float32, rounding would be larger than it
    )


def draw_timesteps(q: Tensor, seed: int, index: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Draw timesteps of images by their shares q (T,), with replacement; t = 0 is the first of each image.

    index int64 (N,). Returns t int64 (N, 1 + draws), and weights float64 of that shape. An image's prior plus
    sum(weights * its terms at t) has its whole bound as its expectation: L_0 counts once, the others 1 / (draws q(t)).
    Each draw is a function of (seed, image, draw).
    """
    words = draw_words(seed, Stream.BOUND_TIMESTEP, 0, index, 2 * draws).double().view(-1, draws, 2) + 2**31
    u = (words[..., 0] + words[..., 1] * 2.0**-32) * 2.0**-32
    t = torch.searchsorted(q.cumsum(0), u, right=True).clamp(max=len(q) - 1)
    first = torch.zeros_like(t[:, :1])
    return torch.cat([first, t], dim=1), torch.cat([first + 1, 1 / (draws * q[t])], dim=1)


class RateDistortion(NamedTuple):
    """Rate and distortion, averaged over images; row k - 1 is after the k-th reverse step (paper, Table 4).

    rate (T,) in bits/dim; rmse (T,) on the scale 0..255; distortion is L_0 in bits/dim. All float64.
    """

    rate: Tensor
    rmse: Tensor
    distortion: float


def compute_rate_distortion(result: BoundTerms) -> RateDistortion:
    """Compute rate and distortion after each reverse step, averaged over images.

    After k of T steps: rate = prior + sum of terms[T - k + 1:], rmse = 127.5 sqrt(mse[T - k]).
    """
    result._require_all_timesteps()
    mse, terms = result.mse.mean(dim=0), result.terms.mean(dim=0)
    sent_before = torch.cat([torch.zeros_like(terms[:1]), terms.flip(0)[:-1].cumsum(0)])
    return RateDistortion(result.prior.mean() + sent_before, 127.5 * mse.flip(0).sqrt(), float(terms[0]))

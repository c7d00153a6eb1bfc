"""The best denoisers of a set of images, in closed form: the linear one and the posterior mean. Nothing is trained.

The linear one's error depends only on the variances l_j (sums divided by n) of the images, in [-1, 1], along their D
principal directions.
"""

import torch
from torch import Tensor, nn

from ddpm.config import LEARNED, Variance
from ddpm.diffusion import Diffusion, Network
from ddpm.images import from_uint8


def make_linear_denoiser(
    diffusion: Diffusion, mean: Tensor, directions: Tensor, variances: Tensor
) -> Network:
    """Return the linear denoiser as a network that predicts x_0, for any `predict` of the diffusion.

    mean (D,), principal directions (D, r) with r <= D, variances (D,): those of the directions, then an equal one of
    each other direction. x_0 = mean + V diag(sqrt(a) l_j / (a l_j + 1 - a)) V^T (x_t - sqrt(a) mean).
    """
    along, rest = variances[: directions.shape[1]], variances[-1:]

    def denoise(x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        a, b = (diffusion.gather(name, t, x_t).flatten(1) for name in ("alpha_bar", "one_minus_alpha_bar"))
        gain, gain_of_rest = (a.sqrt() * v / (a * v + b) for v in (along, rest))
        y = x_t.flatten(1) - a.sqrt() * mean
        x_0 = mean + gain_of_rest * y + ((y @ directions) * (gain - gain_of_rest)) @ directions.T
        return x_0.view_as(x_t)

    return denoise


def compute_linear_mse(variances: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the mean square error of the denoiser's x_0 at each alpha_bar (T,), over images and noise; float64 (T,).

    (1/D) sum_j l_j (1 - a) / (a l_j + 1 - a).
    """
    # All at once would fill the memory if images are large.
    return torch.stack([(variances * (1 - a) / (a * variances + 1 - a)).mean() for a in alpha_bar.double()])


def convert_mse_to_terms(diffusion: Diffusion, mse: Tensor, variance: Variance | None = None) -> Tensor:
    """Return the terms L_1 to L_{T-1} of the bound, bits/dim, of a denoiser with these errors (T,); 0 at index 0.

    They are linear in the error if the variance is fixed; a learned one is treated as fixedlarge.
    """
    kind = variance or diffusion.config.variance
    small = diffusion.tables["log_fixedsmall"]
    large = diffusion.tables[f"log_{'fixedlarge' if kind in LEARNED else kind}"]
    overhead = -1 + large - small + torch.exp(small - large)
    terms = (diffusion.tables["posterior_coef_x_0"] ** 2 * torch.exp(-large) * mse + overhead) / 2
    return terms.index_fill(0, torch.tensor(0), 0.0) / torch.log(torch.tensor(2.0).double())


def compute_profile(diffusion: Diffusion, variances: Tensor, variance: Variance | None = None) -> Tensor:
    """Return the share of each timestep in the linear denoiser's rate, float64 (T,): 0 at t = 0, above 0 elsewhere."""
    mse = compute_linear_mse(variances, diffusion.tables["alpha_bar"])
    terms = convert_mse_to_terms(diffusion, mse, variance)
    terms[1:] = terms[1:].clamp(min=1e-12)  # if all images are equal, fixedsmall leaves none
    return terms / terms.sum()


def compute_posterior_mean(x_t: Tensor, alpha_bar: Tensor, images: Tensor, chunk: int = 4096) -> Tensor:
    """Return E[x_0 | x_t], shaped like x_t (N, C, H, W), where x_0 is one of `images`, each equally likely.

    sum_n w_n x_n with w = softmax_n((sqrt(a) x_t.x_n - a |x_n|^2 / 2) / (1 - a)), by Bayes' rule from Eq. 4.
    alpha_bar (N,) float64; images uint8 (K, C, H, W), read `chunk` at a time. Arithmetic is in the type of x_t: at low
    noise, float32 cannot tell images apart that differ by one grey level in one value, float64 can.
    """
    x, a = x_t.flatten(1), alpha_bar.double()[:, None]
    to_product, to_square = (a.sqrt() / (1 - a)).to(x.dtype), (a / (1 - a) / 2).to(x.dtype)
    largest, total, mean = x.new_full((len(x), 1), -torch.inf), x.new_zeros(len(x), 1), torch.zeros_like(x)
    for part in images.split(chunk):
        x_n = from_uint8(part).to(x.dtype).flatten(1)
        score = to_product * (x @ x_n.T) - to_square * x_n.square().sum(dim=1)
        before, largest = largest, torch.maximum(largest, score.amax(dim=1, keepdim=True))
        weight, kept = (score - largest).exp(), (before - largest).exp()
        total = total * kept + weight.sum(dim=1, keepdim=True)
        mean = mean * kept + weight @ x_n
    return (mean / total).view_as(x_t)


class PosteriorMean(nn.Module):
    """The posterior mean as a network net(x_t, t), whose output is what `predict` of the diffusion names.

    images: uint8 (K, C, H, W), its only buffer; nothing is trained. Arithmetic is in float64.
    """

    images: Tensor

    def __init__(self, diffusion: Diffusion, images: Tensor) -> None:
        super().__init__()
        self.diffusion = diffusion
        self.register_buffer("images", images)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        x = x_t.double()
        alpha_bar = self.diffusion.gather("alpha_bar", t, x)
        x_0 = compute_posterior_mean(x, alpha_bar.flatten(), self.images)
        eps = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()  # Eq. 4 solved for eps
        return self.diffusion.compute_target(x_0, x, t, eps).to(x_t.dtype)

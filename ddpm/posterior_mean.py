"""The best denoiser of a known set of images, in closed form: the posterior mean E[x_0 | x_t]."""

import torch
from torch import Tensor, nn

from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8


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

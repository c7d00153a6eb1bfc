"""The best linear denoiser of a set of images, in closed form: nothing is trained, and nothing is drawn.

Of the images only the variances l_j along their D principal directions count (images scaled to [-1, 1], divided by n).
"""

import torch
from torch import Tensor

from ddpm.config import LEARNED, Variance
from ddpm.diffusion import Diffusion


def compute_linear_mse(variances: Tensor, alpha_bar: Tensor, squares: Tensor | None = None) -> Tensor:
    """Return the mean square error of its estimate of x_0 at each alpha_bar (T,), over pixels and noise; float64 (T,).

    (1/D) sum_j (1 - s_j)^2 z_j^2 + s_j^2 (1 - a)/a, where s_j = a l_j / (a l_j + 1 - a) and z_j is the image's
    deviation from the mean along direction j. squares (D,): z_j^2, of one image or on average over several; without
    them those of the images that it was fitted to, which are l_j.
    """
    squares = variances if squares is None else squares
    found = []
    for a in alpha_bar.double():  # all at once would fill the memory where images are large
        total = a * variances + 1 - a
        found.append((((1 - a) / total) ** 2 * squares + a * (1 - a) * (variances / total) ** 2).mean())
    return torch.stack(found)


def convert_mse_to_terms(diffusion: Diffusion, mse: Tensor, variance: Variance | None = None) -> Tensor:
    """Return the terms L_1 to L_{T-1} of the bound, bits/dim, of a denoiser with these errors (T,); 0 at index 0.

    They are linear in the error where the variance is fixed; one that is learned is taken for fixedlarge.
    """
    kind = variance or diffusion.config.variance
    small = diffusion.tables["log_fixedsmall"]
    large = diffusion.tables[f"log_{'fixedlarge' if kind in LEARNED else kind}"]
    overhead = -1 + large - small + torch.exp(small - large)
    terms = (diffusion.tables["posterior_coef_x_0"] ** 2 * torch.exp(-large) * mse + overhead) / 2
    return terms.index_fill(0, torch.tensor(0), 0.0) / torch.log(torch.tensor(2.0).double())


def compute_profile(diffusion: Diffusion, variances: Tensor, variance: Variance | None = None) -> Tensor:
    """Return the share of each timestep in this denoiser's rate, float64 (T,): 0 at t = 0, above 0 elsewhere."""
    mse = compute_linear_mse(variances, diffusion.tables["alpha_bar"])
    terms = convert_mse_to_terms(diffusion, mse, variance)
    terms[1:] = terms[1:].clamp(min=1e-12)  # where all images are equal, fixedsmall leaves none
    return terms / terms.sum()

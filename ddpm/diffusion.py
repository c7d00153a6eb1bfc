"""The diffusion process of Ho, Jain and Abbeel 2020 (arXiv 2006.11239).

Index t = 0..T-1 is the paper's t = 1..T. Images are (N, C, H, W) floats in [-1, 1]; t is int64 (N,). Tables
are float64 and are cast to the images' type only when they are gathered. The names q_sample, q_posterior,
q_mean_variance and p_mean_variance are those of the authors' code.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.config import LEARNED, Decoder, DiffusionConfig, Variance, refuse_problems
from ddpm.gaussians import average_per_image, compute_decoder_log_likelihood, compute_normal_kl
from ddpm.schedules import get_betas

Network = Callable[..., Tensor]  # net(x_t, t) or net(x_t, t, context) -> (N, C or 2C, H, W)


class Gaussian(NamedTuple):
    """Distribution q(x_{t-1} | x_t, x_0) or p(x_{t-1} | x_t): mean, log_variance, and x_0.

    x_0: the estimate behind them. mean and x_0 are shaped like x_t; log_variance broadcasts against it.
    """

    mean: Tensor
    log_variance: Tensor
    x_0: Tensor


class Diffusion:
    """Forward and reverse process. Immutable: to() and respace() return new objects.

    timesteps (K,) int64: the network's t at each step of this chain; 0..T-1 unless the chain is respaced.
    """

    def __init__(self, config: DiffusionConfig | None = None, betas: Tensor | None = None) -> None:
        """Make the process of `config`; `betas` (T,), if given, replace its schedule and its number of timesteps."""
        config = config or DiffusionConfig()
        if betas is not None:
            values = tuple(betas.reshape(-1).tolist())
            config = replace(config, betas=values, timesteps=len(values))
        refuse_problems(config.find_problems())
        self.config = config
        self.tables = _compute_tables(get_betas(config))
        self.timesteps = torch.arange(config.timesteps)
        self.is_respaced = False

    def __repr__(self) -> str:
        config, steps = self.config, f"{len(self)} of {self.config.timesteps} steps"
        schedule = "own betas" if config.betas else f"{config.beta_schedule} betas"
        return f"Diffusion({steps}, {schedule}, predict={config.predict}, variance={config.variance})"

    def __len__(self) -> int:
        """Return the number of steps of this chain."""
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> "Diffusion":
        """Return the same process with its tables on `device`."""
        moved = copy.copy(self)
        tables = torch.stack(list(self.tables.values())).to(device)  # one copy for all
        moved.tables = dict(zip(self.tables, tables, strict=True))
        moved.timesteps = self.timesteps.to(device)
        return moved

    def respace(self, timesteps: Sequence[int] | Tensor) -> "Diffusion":
        """Return the process on ascending timesteps only (Nichol and Dhariwal 2021, Sec. 4); its t is 0..K-1.

        A prefix 0..k is the end of the reverse process, unchanged. variance=learned belongs to full steps and
        does not carry over to other spacings; learned_range does.
        """
        chosen = torch.as_tensor(timesteps, dtype=torch.int64, device=self.timesteps.device)
        ascending = len(chosen) > 0 and bool((chosen.diff() > 0).all())
        if not ascending or chosen[0] < 0 or chosen[-1] >= len(self):
            raise ValueError(f"timesteps must ascend within 0..{len(self) - 1}, got {chosen.tolist()[:10]}")
        chain = copy.copy(self)
        chain.timesteps = self.timesteps[chosen]
        if torch.equal(chosen, torch.arange(len(chosen), device=chosen.device)):
            chain.tables = {name: table[: len(chosen)] for name, table in self.tables.items()}
            return chain
        bars = self.tables["alpha_bar"][chosen]
        betas = 1 - bars / torch.cat([torch.ones_like(bars[:1]), bars[:-1]])
        kept = {name: self.tables[name][chosen] for name in ("step_coef_x_0", "step_coef_x_t")}
        chain.tables = _compute_tables(betas) | kept
        chain.is_respaced = True
        return chain

    def count_output_channels(self, channels: int) -> int:
        """Return the number of channels of the network's output: twice the image's if the variance is learned."""
        return 2 * channels if self.config.variance in LEARNED else channels

    def q_mean_variance(self, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_t | x_0), Eq. 4."""
        signal, variance = (self.gather(name, t, x_0) for name in ("sqrt_alpha_bar", "one_minus_alpha_bar"))
        return signal * x_0, variance, self.gather("log_one_minus_alpha_bar", t, x_0)

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor | None = None) -> Tensor:
        """Draw x_t from q(x_t | x_0) (Eq. 4). eps: standard normal, of the shape of x_0; None: drawn here."""
        eps = torch.randn_like(x_0) if eps is None else eps
        _require_same_shape(x_0=x_0, eps=eps)
        signal, spread = (
            self.gather(name, t, x_0) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
        )
        return signal * x_0 + spread * eps

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """Return q(x_{t-1} | x_t, x_0), Eqs. 6 and 7; the log variance at t = 0 is that of t = 1 (authors' code)."""
        _require_same_shape(x_0=x_0, x_t=x_t)
        c_0, c_t = (self.gather(name, t, x_t) for name in ("posterior_coef_x_0", "posterior_coef_x_t"))
        mean = c_0 * x_0 + c_t * x_t
        return Gaussian(mean, self.gather("log_fixedsmall", t, x_t), x_0)

    def predict_x0(self, output: Tensor, x_t: Tensor, t: Tensor, clip: bool = False) -> Tensor:
        """Return the estimate of x_0 from the network's output, clipped to [-1, 1] if asked."""
        prediction, _ = _split_output(output, x_t)
        match self.config.predict:
            case "eps":  # Eq. 4 solved for x_0 (text after Eq. 14)
                noise = self.gather("sqrt_one_minus_alpha_bar", t, x_t) * prediction
                x_0 = (x_t - noise) / self.gather("sqrt_alpha_bar", t, x_t)
            case "x0":
                x_0 = prediction
            case "v":  # Salimans and Ho 2022, App. D
                x_0 = self.gather("sqrt_alpha_bar", t, x_t) * x_t
                x_0 = x_0 - self.gather("sqrt_one_minus_alpha_bar", t, x_t) * prediction
            case "mean":  # Eq. 7 solved for x_0, by the full chain's coefficients: that is what was trained
                rest = prediction - self.gather("step_coef_x_t", t, x_t) * x_t
                x_0 = rest / self.gather("step_coef_x_0", t, x_t)
        return x_0.clamp(-1, 1) if clip else x_0

    def p_mean_variance(
        self, output: Tensor, x_t: Tensor, t: Tensor, clip: bool = True, variance: Variance | None = None
    ) -> Gaussian:
        """Return p(x_{t-1} | x_t) from the network's output (N, C or 2C, H, W).

        clip limits the x_0 estimate to [-1, 1] before the posterior mean; predict=mean is used as it is.
        variance overrides the configured kind; a learned kind needs an output of 2C channels.
        """
        x_0 = self.predict_x0(output, x_t, t, clip)
        if self.config.predict == "mean" and not self.is_respaced:
            mean = _split_output(output, x_t)[0]
        else:
            mean = self.q_posterior(x_0, x_t, t).mean
        log_variance = self._compute_log_variance(output, x_t, t, variance or self.config.variance)
        return Gaussian(mean, log_variance, x_0)

    def _compute_log_variance(self, output: Tensor, x_t: Tensor, t: Tensor, kind: Variance) -> Tensor:
        if kind in ("fixedlarge", "fixedsmall"):
            return self.gather(f"log_{kind}", t, x_t)
        _, values = _split_output(output, x_t)
        if values is None:
            raise ValueError(
                f"variance={kind} needs a network of {2 * x_t.shape[1]} output channels, this one has "
                f"{output.shape[1]}: use fixedlarge or fixedsmall"
            )
        if kind == "learned_range":  # Nichol and Dhariwal 2021, Eq. 15, for values in [-1, 1]
            small, large = self.gather("log_fixedsmall", t, x_t), self.gather("log_beta", t, x_t)
            return small + (values + 1) / 2 * (large - small)
        if self.is_respaced:
            raise ValueError("variance=learned holds for full steps only: use fixedlarge or fixedsmall")
        return values

    def compute_bound_terms(
        self, reverse: Gaussian, x_0: Tensor, x_t: Tensor, t: Tensor, decoder: Decoder = "tanh"
    ) -> Tensor:
        """Return a term of the bound per image (N,), bits/dim: L_{t-1} (Eq. 5), or L_0 (Eq. 13) at t = 0."""
        posterior = self.q_posterior(x_0, x_t, t)
        kl = compute_normal_kl(posterior.mean, posterior.log_variance, reverse.mean, reverse.log_variance)
        nll = -compute_decoder_log_likelihood(x_0, reverse.mean, reverse.log_variance, decoder)
        return torch.where(t == 0, average_per_image(nll), average_per_image(kl)) / math.log(2)

    def compute_losses(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the loss per image (N,): simple (Eq. 14), vlb (one term of Eq. 5 in bits/dim, not times T) or hybrid.

        hybrid is simple + T/1000 vlb with the mean detached (Nichol and Dhariwal 2021, Eq. 16). Nothing is clipped.
        """
        output = output.to(x_t.dtype)  # a network under autocast answers in bf16
        if self.config.loss == "vlb":
            return self.compute_bound_terms(self.p_mean_variance(output, x_t, t, clip=False), x_0, x_t, t)
        prediction, _ = _split_output(output, x_t)
        loss = average_per_image((self.compute_target(x_0, x_t, t, eps) - prediction) ** 2)
        if self.config.loss == "simple":
            return loss
        frozen = torch.cat([prediction.detach(), output[:, x_t.shape[1] :]], dim=1)
        vlb = self.compute_bound_terms(self.p_mean_variance(frozen, x_t, t, clip=False), x_0, x_t, t)
        return loss + vlb * len(self) / 1000

    def compute_target(self, x_0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the value that the network should predict for x_t = q_sample(x_0, t, eps)."""
        match self.config.predict:
            case "eps":
                return eps
            case "x0":
                return x_0
            case "v":
                target = self.gather("sqrt_alpha_bar", t, x_0) * eps
                return target - self.gather("sqrt_one_minus_alpha_bar", t, x_0) * x_0
            case "mean":
                return self.q_posterior(x_0, x_t, t).mean

    def gather(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """Return the values of a table at t, (N, 1, 1, 1), in the dtype of x."""
        if t.dtype != torch.int64 or t.shape != x.shape[:1]:
            raise ValueError(f"t must be int64 of shape ({len(x)},), got {t.dtype} of shape {tuple(t.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"images must be floats in [-1, 1], got {x.dtype}: see ddpm.images.from_uint8")
        values = self.tables[name].to(t.device)[t].to(x.dtype)
        return values.reshape(-1, *[1] * (x.ndim - 1))


def _compute_tables(beta: Tensor) -> dict[str, Tensor]:
    """Compute every table that is indexed by t, float64 (K,); symbols as in the paper's Eqs. 4 to 7."""
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    alpha_bar_prev = torch.cat([torch.ones_like(beta[:1]), alpha_bar[:-1]])
    variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    coef_x_0 = beta * alpha_bar_prev.sqrt() / (1 - alpha_bar)
    coef_x_t = (1 - alpha_bar_prev) * (1 - beta).sqrt() / (1 - alpha_bar)
    # beta~ at t = 0 is 0 and its log infinite: it is replaced by the next one (authors' code).
    first = variance[1:2] if len(beta) > 1 else beta
    return {
        "beta": beta,
        "log_beta": beta.log(),
        "alpha_bar": alpha_bar,
        "alpha_bar_prev": alpha_bar_prev,
        "log_snr": (alpha_bar / (1 - alpha_bar)).log(),
        "sqrt_alpha_bar": alpha_bar.sqrt(),
        "one_minus_alpha_bar": 1 - alpha_bar,
        "log_one_minus_alpha_bar": (1 - alpha_bar).log(),
        "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
        "posterior_variance": variance,
        "posterior_coef_x_0": coef_x_0,
        "posterior_coef_x_t": coef_x_t,
        "step_coef_x_0": coef_x_0,
        "step_coef_x_t": coef_x_t,
        "log_fixedsmall": torch.cat([first, variance[1:]]).log(),
        "log_fixedlarge": torch.cat([first, beta[1:]]).log(),
    }


def _split_output(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split off the prediction and, if the output has 2C channels, the values that parameterise the variance."""
    channels = x_t.shape[1]
    fits = output.ndim == x_t.ndim and output.shape[2:] == x_t.shape[2:] and len(output) == len(x_t)
    if not fits or output.shape[1] not in (channels, 2 * channels):
        raise ValueError(f"output of shape {tuple(output.shape)} does not fit images of {tuple(x_t.shape)}")
    if output.shape[1] == channels:
        return output, None
    return output[:, :channels], output[:, channels:]


def _require_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))

"""Draws images: Algorithm 2, DDIM, DPM-Solver++, interpolation, guidance. Chains are generators of steps.

Networks must be in evaluation mode. noise(t) gives z for the step from the network's t; the last step has none.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from itertools import islice
from typing import ParamSpec, get_args

import torch
from torch import Tensor

from ddpm.config import Sampler, Spacing, Variance
from ddpm.diffusion import Diffusion, Network
from ddpm.gaussians import draw_gaussian
from ddpm.rng import Stream, draw_normal

Noise = Callable[[int], Tensor]
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class ReverseStep:
    """Result of the reverse step at timestep t: x_t after it, and the estimate of x_0; (N, C, H, W)."""

    t: int
    x_t: Tensor
    x_0: Tensor


@torch.no_grad()
def run_chain(
    diffusion: Diffusion, net: Network, x_T: Tensor, noise: Noise, *, sampler: Sampler = "ancestral",
    eta: float = 0.0, variance: Variance | None = None, timesteps: Sequence[int] | Tensor | None = None,
    context: Tensor | None = None, clip: bool = True,
) -> Iterator[ReverseStep]:  # fmt: skip
    """Reverse the diffusion from x_T (N, C, H, W), over all timesteps or an ascending subset of them.

    eta belongs to DDIM and DPM-Solver++: with 0 they are deterministic (DPM-Solver++ is 2M), with 1 DDIM is ancestral
    sampling with fixedsmall, and DPM-Solver++ is SDE-2M. variance replaces the configured kind in ancestral sampling.
    clip is that of Diffusion.p_mean_variance. With the timesteps 0..t the chain starts at x_t.
    """
    if sampler not in get_args(Sampler):
        raise ValueError(f"unknown sampler {sampler!r}: choose {' or '.join(get_args(Sampler))}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    diffusion = diffusion.to(x_T.device)
    if timesteps is not None:
        diffusion = diffusion.respace(timesteps)
    visited, x_t = diffusion.timesteps.tolist(), x_T
    labels = () if context is None else (context,)
    weights = _compute_extrapolation(diffusion) if sampler == "dpm++" else []
    x_0_before = None
    for i in reversed(range(len(visited))):
        t = torch.full((len(x_t),), i, device=x_t.device)
        output = net(x_t, torch.full_like(t, visited[i]), *labels).to(x_t.dtype)
        if sampler == "ancestral":  # Algorithm 2, line 4
            mean, log_variance, x_0 = diffusion.p_mean_variance(output, x_t, t, clip, variance)
            deviation = torch.exp(0.5 * log_variance)
        else:  # DDIM (Song, Meng and Ermon 2020, Eqs. 12 and 16): towards x_0, along the eps that belongs to it
            x_0 = aim = diffusion.predict_x0(output, x_t, t, clip)
            if sampler == "dpm++":
                aim = x_0 if x_0_before is None else x_0 + weights[i] * (x_0 - x_0_before)
                x_0_before = x_0
            names = ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "alpha_bar_prev", "posterior_variance")
            signal, spread, alpha_bar_prev, smallest = (diffusion.gather(name, t, x_t) for name in names)
            eps, squared = (x_t - signal * aim) / spread, eta**2 * smallest
            mean = alpha_bar_prev.sqrt() * aim + (1 - alpha_bar_prev - squared).clamp(min=0).sqrt() * eps
            deviation = squared.sqrt()
        x_t = mean + deviation * noise(visited[i]) if i > 0 else mean
        yield ReverseStep(visited[i], x_t, x_0)


def _compute_extrapolation(diffusion: Diffusion) -> list[float]:
    """Compute DPM-Solver++'s weight of the change of x_0 since the step before, for each step of the chain.

    It is h / (2 h_before), for steps h of the log SNR (Lu et al. 2022, arXiv 2211.01095, Algorithm 2). With it, 2M and
    SDE-2M are DDIM with eta = 0 and 1. The first and the last step are of first order.
    """
    h = -diffusion.tables["log_snr"].diff()
    return [0.0, *(h[:-1] / (2 * h[1:])).tolist(), 0.0]


@torch.no_grad()
def step_back(
    diffusion: Diffusion, net: Network, x_t: Tensor, t: Tensor, eps: Tensor | None = None, *,
    variance: Variance | None = None, context: Tensor | None = None, clip: bool = True,
) -> Tensor:  # fmt: skip
    """Draw x_{t-1} from p(x_{t-1} | x_t) (Algorithm 2, line 4); t: int64 (N,) of this chain, one for each image.

    eps: the noise; None: drawn here. At t = 0 none is added.
    """
    output = net(x_t, diffusion.timesteps[t], *(() if context is None else (context,)))
    mean, log_variance, _ = diffusion.p_mean_variance(output, x_t, t, clip, variance)
    return torch.where((t == 0).view(-1, 1, 1, 1), mean, draw_gaussian(mean, log_variance.exp(), eps))


def space_timesteps(diffusion: Diffusion, steps: int, spacing: Spacing = "uniform") -> list[int]:
    """Return `steps` timesteps of the diffusion, ascending, with the first and the last one.

    They lie evenly in t (Nichol and Dhariwal 2021), in the root of t (Song, Meng and Ermon 2020) or in the log SNR (Lu
    et al. 2022). If rounding makes two of them equal, one moves to the next free timestep.
    """
    last, log_snr = len(diffusion) - 1, diffusion.tables["log_snr"].cpu()
    if not 1 <= steps <= last + 1:
        raise ValueError(f"steps must lie in 1..{last + 1}, got {steps}")
    if spacing not in get_args(Spacing):
        raise ValueError(f"unknown spacing {spacing!r}: choose {' or '.join(get_args(Spacing))}")
    if steps == 1:
        return [last]
    if spacing == "logsnr":
        if log_snr[-1].isinf():
            raise ValueError("spacing=logsnr needs an x_T with some signal; this schedule leaves none")
        wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), steps, dtype=log_snr.dtype)
        nearest = [int((log_snr - value).abs().argmin()) for value in wanted]
    else:
        power = 2 if spacing == "quadratic" else 1
        nearest = [round(i**power * last / (steps - 1) ** power) for i in range(steps)]
    chosen = [0]
    for i, t in enumerate(nearest[1:], 1):
        chosen.append(min(max(t, chosen[-1] + 1), last + 1 - steps + i))
    return chosen


def run_image_chains(
    diffusion: Diffusion, net: Network, *, index: Tensor, shape: tuple[int, int, int], seed: int,
    steps: int | None = None, spacing: Spacing = "uniform", sampler: Sampler = "ancestral", eta: float = 0.0,
    variance: Variance | None = None, context: Tensor | None = None, clip: bool = True,
) -> Iterator[ReverseStep]:  # fmt: skip
    """Run the chain of the images index (int64, (N,)) of shape (C, H, W), a function of seed and index alone.

    All is drawn on the device of index. steps and spacing respace the chain (None: all timesteps); sampler, eta,
    variance and clip are those of `run_chain`.
    """
    timesteps = None if steps is None else space_timesteps(diffusion, steps, spacing)
    draw = partial(draw_normal, seed, index=index, shape=shape)
    return run_chain(
        diffusion, net, draw(Stream.X_T, 0), partial(draw, Stream.REVERSE),
        sampler=sampler, eta=eta, variance=variance, timesteps=timesteps, context=context, clip=clip,
    )  # fmt: skip


def _make_image_function(run: Callable[Arguments, Iterator[ReverseStep]]) -> Callable[Arguments, Tensor]:
    """Return a function with the arguments of `run` that returns only the images at the end of the chain."""

    @wraps(run, assigned=())
    def sample(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        """Draw images (N, C, H, W), in [-1, 1] unless clip=False; the arguments are those of `run_image_chains`."""
        images = run_to_end(run(*args, **kwargs))
        return images.clamp(-1, 1) if kwargs.get("clip", True) else images

    return sample


sample = _make_image_function(run_image_chains)


def run_to_end(steps: Iterator[ReverseStep]) -> Tensor:
    """Return the images of the last step; no other step is kept in memory."""
    return deque(steps, maxlen=1).pop().x_t


def explain_few_steps(
    diffusion: Diffusion, steps: int | None, variance: Variance | None = None
) -> str | None:
    """Return why so few ancestral steps with fixedlarge variance spoil the images; None if they do not."""
    kind = variance or diffusion.config.variance
    if kind != "fixedlarge" or steps is None or steps >= len(diffusion) // 2:
        return None
    return (
        f"{steps} of {len(diffusion)} steps with variance=fixedlarge leave noise in the images (CIFAR-10 FID "
        "367 at 10 steps, 10 at 100): use variance=fixedsmall or another sampler"
    )


def choose_ancestral_variance(sampler: Sampler, variance: Variance | None) -> Variance | None:
    """Return the variance of a run's ancestral chains; fixedsmall (that of eta = 1) if its sampler is another one."""
    return variance if sampler == "ancestral" else "fixedsmall"


def interpolate(
    diffusion: Diffusion, net: Network, x_a: Tensor, x_b: Tensor, weight: float | Tensor, steps: int,
    eps: Tensor | tuple[Tensor, Tensor] | None = None, noise: Noise | None = None, *,
    variance: Variance | None = None, context: Tensor | None = None, clip: bool = True,
) -> Tensor:  # fmt: skip
    """Interpolate between x_a and x_b (N, C, H, W): diffuse both for `steps`, mix the latents, reverse (Sec. 4.4).

    weight: the paper's lambda in [0, 1], one for all or (N,); 0 is x_a. eps (N, C, H, W) diffuses both images, or is
    one for each; eps and noise are drawn here if None. More steps mix coarser features (Fig. 9); 0 mix the pixels.
    """
    mix = torch.as_tensor(weight, dtype=x_a.dtype, device=x_a.device).reshape(-1, 1, 1, 1)
    if not bool(((mix >= 0) & (mix <= 1)).all()):  # nor nan
        raise ValueError(f"lambda must lie in [0, 1], got {mix.flatten().tolist()}")
    if not 0 <= steps <= len(diffusion):
        raise ValueError(f"steps must lie in 0..{len(diffusion)}, got {steps}")
    if steps == 0:
        return (1 - mix) * x_a + mix * x_b
    t = torch.full((len(x_a),), steps - 1, device=x_a.device)
    eps = torch.randn_like(x_a) if eps is None else eps
    eps_a, eps_b = eps if isinstance(eps, tuple) else (eps, eps)
    x_t = (1 - mix) * diffusion.q_sample(x_a, t, eps_a) + mix * diffusion.q_sample(x_b, t, eps_b)
    noise = noise or (lambda t: torch.randn_like(x_t))
    chain = run_chain(
        diffusion, net, x_t, noise, variance=variance, timesteps=range(steps), context=context, clip=clip
    )
    return run_to_end(chain)


def draw_shared_latent(
    diffusion: Diffusion, net: Network, x_T: Tensor, noise: Noise, steps: int, *,
    variance: Variance | None = None, context: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run the reverse process from x_T and return x_t (N, C, H, W) when `steps` steps remain.

    Ancestral chains over timesteps=range(steps) that start from it share its features (Fig. 7).
    """
    if not 1 <= steps <= len(diffusion):
        raise ValueError(f"steps must lie in 1..{len(diffusion)}, got {steps}")
    x_t, chain = x_T, run_chain(diffusion, net, x_T, noise, variance=variance, context=context)
    for step in islice(chain, len(diffusion) - steps):
        x_t = step.x_t
    return x_t


def add_guidance(net: Network, scale: float, null_context: Tensor | int) -> Network:
    """Return a network with classifier-free guidance: null + scale (labelled - null), by one call of 2N images.

    Ho and Salimans 2022, Eq. 6, with scale = 1 + w: 1 is the plain conditional network, 0 the unconditional one.
    null_context (a label, or a tensor like one row of context) stands for none. Variances are the given context's.
    """

    def net_with_guidance(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        null = torch.zeros_like(context) + null_context
        chosen, without = net(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([context, null])).chunk(2)
        prediction = slice(0, x_t.shape[1])
        mixed = without[:, prediction] + scale * (chosen[:, prediction] - without[:, prediction])
        return torch.cat([mixed, chosen[:, x_t.shape[1] :]], dim=1)

    return net_with_guidance

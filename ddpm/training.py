"""Algorithm 1 with Adam, learning-rate warm-up, gradient clipping and EMA (Appendix B and the authors' code).

It joins network and diffusion, as `ddpm.model` does for a trained network. Every random number is a function of (seed,
stream, step, row of the global batch), so neither the number of workers nor an interruption changes what is drawn. The
exceptions are importance-sampled t, which depend on earlier losses, and torch's own dropout in a custom network.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ddpm import rng
from ddpm.config import DiffusionConfig, TrainConfig, find_value_problems, refuse_problems
from ddpm.diffusion import Diffusion, Network
from ddpm.ema import EMA
from ddpm.images import from_uint8
from ddpm.kernels.cuda import call_with_cast_weights, draw_masks
from ddpm.networks import NO_LABEL
from ddpm.networks.layers import RowDropout, set_dropout_keys
from ddpm.precision import autocast, use_precision
from ddpm.rng import Stream
from ddpm.timesteps import ImportanceSampler

# With the arguments and results of compute_gradients.
Gradients = Callable[..., tuple[Tensor, Tensor, Tensor]]


class TrainState:
    """State of a training: network, averages, Adam's moments and number of updates.

    t_sampler: the history of losses for importance sampling of t; None if t is uniform.
    """

    def __init__(self, config: TrainConfig, net: nn.Module, diffusion: DiffusionConfig) -> None:
        """Make the state before the first update. `net` is on its device and in its memory format already."""
        refuse_problems(find_value_problems(config))
        self.net, self.step = net, 0
        self.emas = [EMA(net, decay, config.ema_warmup) for decay in config.ema_decay]
        self.t_sampler = None
        if diffusion.t_sampling == "importance":
            self.t_sampler = ImportanceSampler(diffusion.timesteps, next(net.parameters()).device)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
        for p in net.parameters():  # makes the moments now, so that a new state has all its tensors
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.net.parameters())
        return f"TrainState(step {self.step}, {type(self.net).__name__} of {count:,} parameters, {self.emas})"

    def state_dict(self) -> dict[str, Tensor]:
        """Return net.*, ema.<i>.*, adam.exp_avg.*, adam.exp_avg_sq.*, adam.step, t_sampler.* and step.

        The tensors are live, not copies (`step` apart): write or clone them before the next update.
        """
        found = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        for i, ema in enumerate(self.emas):
            found |= {f"ema.{i}.{name}": tensor for name, tensor in ema.state_dict().items()}
        for name, p in self.net.named_parameters():
            moments = self.optimizer.state[p]
            found |= {f"adam.{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
            found["adam.step"] = moments["step"]  # the same for every parameter
        if self.t_sampler is not None:
            found["t_sampler.losses"] = self.t_sampler.losses
            found["t_sampler.counts"] = self.t_sampler.counts
        return found | {"step": torch.tensor(self.step)}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state_dict()` returned, on any device; raise ValueError, and change nothing, if keys differ."""
        own = self.state_dict()
        if faults := describe_mismatch(own, tensors):
            raise ValueError(f"the saved state is of another network or optimiser: {faults}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for moments in self.optimizer.state.values():
            moments["step"].copy_(tensors["adam.step"])
        self.step = int(tensors["step"])

    def update(self, config: TrainConfig) -> Tensor:
        """Clip the gradient, make one step of Adam, update the EMA; return the norm before clipping, on the device."""
        if any(p.stride() != moments["exp_avg"].stride() for p, moments in self.optimizer.state.items()):
            # The fused kernel reads memory in order: it would pair weights with the moments of other weights.
            raise RuntimeError("the memory format changed after TrainState was made: change it before")
        gradient = [p.grad for p in self.net.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradient)
        if config.grad_clip is not None:
            torch._foreach_mul_(gradient, config.grad_clip / norm.clamp(min=config.grad_clip))
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(config, self.step)
        self.optimizer.step()
        for ema in self.emas:
            ema.update(self.net, self.step)
        self.step += 1
        return norm


def describe_mismatch(own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """Return why `given` cannot be loaded into `own`, in one line; empty if it can."""
    needed, found = (
        {name: f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for name, x in tensors.items()}
        for tensors in (own, given)
    )
    both = needed.keys() & found.keys()
    faults = {
        "missing": needed.keys() - both,
        "unexpected": found.keys() - both,
        "different": {f"{n} is {found[n]}, not {needed[n]}" for n in both if needed[n] != found[n]},
    }
    return "; ".join(
        f"{len(names)} {fault} ({', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''})"
        for fault, names in faults.items()
        if names
    )


def draw_batch_noise(
    seed: int, step: rng.Word, rows: Tensor, shape: tuple[int, ...], timesteps: int,
    t_sampler: ImportanceSampler | None, dropouts: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw the random values of update `step` for rows (int64, (N,)) of the global batch, on the device of rows.

    Returns t int64 (N,), uniform over 0..T-1 or drawn by t_sampler; the weight float32 (N,) of each loss, 1 if t is
    uniform; eps float32 (N, C, H, W); flip bool (N,), true with probability 1/2; label float32 (N,), uniform in
    [0, 1); words int32 (N, 2 * dropouts), the keys of the dropout layers.
    """
    counts = {Stream.NOISE: math.prod(shape), Stream.DROPOUT: 2 * dropouts}
    counts |= {Stream.TIMESTEP: 1, Stream.FLIP: 1, Stream.LABEL: 1}
    words = rng.draw_blocks(seed, step, rows, counts)
    if t_sampler is None:
        t = rng.to_integers(words[Stream.TIMESTEP], timesteps)
        weight = torch.ones(len(rows), device=rows.device)
    else:
        t, weight = t_sampler.draw(rng.to_uniform(words[Stream.TIMESTEP]))
    eps, flip = rng.to_normal(words[Stream.NOISE], shape), rng.to_integers(words[Stream.FLIP], 2) == 1
    keys = rng.to_words(words[Stream.DROPOUT], 2 * dropouts)
    return t, weight, eps, flip, rng.to_uniform(words[Stream.LABEL]), keys


def train_step(
    state: TrainState, diffusion: Diffusion, x_0: Tensor, rows: Tensor, *, config: TrainConfig, seed: int,
    context: Tensor | None = None, forward: nn.Module | None = None, world_size: int = 1,
    sum_over_workers: Callable[[Tensor], Tensor] = lambda value: value, compute: Gradients | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Make one update with this worker's slice of the global batch (Algorithm 1).

    The arguments are those of `compute_gradients`; compute: what replaces it, as `RecordedGradients`. Returns 0-d
    tensors: loss, so weighted that its mean over workers is the mean over the global batch, and grad_norm before
    clipping. Only importance sampling of t waits for the device.
    """
    if world_size == 1 and len(rows) != config.batch_size:
        raise ValueError(
            f"{len(rows)} rows are no batch of config.batch_size={config.batch_size}: leave the rest out"
        )
    t, weight, losses = (compute or compute_gradients)(
        state, diffusion, x_0, rows, config=config, seed=seed, context=context, forward=forward, world_size=world_size
    )  # fmt: skip
    if state.t_sampler is not None:
        # The history takes the whole global batch, so that all workers hold the same.
        batch = torch.zeros(2, config.batch_size, dtype=torch.float64, device=losses.device)
        batch[:, rows[0] : rows[-1] + 1] = torch.stack((t.double(), losses.double()))
        batch = sum_over_workers(batch)
        state.t_sampler.update(batch[0].long(), batch[1].float())
    loss = (losses * weight).sum() * (world_size / config.batch_size)
    return {"loss": loss, "grad_norm": state.update(config)}


def compute_gradients(
    state: TrainState, diffusion: Diffusion, x_0: Tensor, rows: Tensor, *, config: TrainConfig, seed: int,
    context: Tensor | None = None, forward: nn.Module | None = None, world_size: int = 1, step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of this worker's slice of the global batch, in config.accumulate parts.

    x_0: (N, C, H, W) on the network's device, uint8 or float in [-1, 1]; rows: int64 (N,) on the CPU, consecutive
    positions in the global batch; context: labels, int64 (N,), or float vectors (N, width). forward: the network as it
    is called, wrapped or compiled. Slices may differ in length: each is weighted by it, so that the workers' average is
    the gradient of the mean over the global batch. step: state.step on the device, for a CUDA graph, which cannot seed
    torch's generator: the caller does. Returns t int64, weight and loss of each image, float32, all (N,).
    """
    net = state.net if forward is None else forward
    x_0 = from_uint8(x_0) if x_0.dtype == torch.uint8 else x_0
    on_device = rows.to(x_0.device, non_blocking=True)
    dropouts = [layer for layer in state.net.modules() if isinstance(layer, RowDropout) and layer.p > 0]
    t, weight, eps, flip, label, words = draw_batch_noise(
        seed, state.step if step is None else step, on_device, x_0.shape[1:], len(diffusion), state.t_sampler,
        len(dropouts),
    )  # fmt: skip
    x_0 = torch.where((flip & config.random_flip)[:, None, None, None], x_0.flip(3), x_0)
    if context is not None:
        is_dropped = label < config.label_dropout
        none = 0 if context.is_floating_point() else NO_LABEL
        context = context.masked_fill(is_dropped.view(-1, *[1] * (context.ndim - 1)), none)
    scale = world_size / config.batch_size  # the average over workers divides by their number
    keys = words.T.reshape(len(dropouts), 2, len(rows), 1)
    parts = config.accumulate or 1
    ends = sorted({len(rows) * i // parts for i in range(parts + 1)})
    state.optimizer.zero_grad(set_to_none=True)
    casts_weights = config.precision == "bf16" and x_0.device.type == "cuda" and net is state.net
    found = []
    for part in map(slice, ends, ends[1:]):
        # Gradients are averaged over the workers with the last part.
        average = nullcontext() if part.stop == len(rows) else getattr(net, "no_sync", nullcontext)()
        with average, set_dropout_keys(dropouts, keys[:, :, part]), use_precision(config.precision):
            draw_masks(dropouts)
            if step is None:  # for networks that draw in other ways than by RowDropout
                torch.manual_seed(
                    rng.draw_torch_seed(seed, Stream.DROPOUT, state.step, int(rows[part.start]))
                )
            x_t = diffusion.q_sample(x_0[part], t[part], eps[part])
            inputs = x_t, t[part], None if context is None else context[part]
            with autocast(config.precision, x_t.device):
                output = call_with_cast_weights(net, *inputs) if casts_weights else net(*inputs)
            loss = diffusion.compute_losses(output, x_0[part], x_t, t[part], eps[part])
            ((loss * weight[part]).sum() * scale).backward()
        found.append(loss.detach())
    return t, weight, torch.cat(found)


def compute_batch_loss(
    diffusion: Diffusion, net: Network, x_0: Tensor, t: Tensor | None = None, eps: Tensor | None = None,
    context: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute the loss of a batch x_0 (N, C, H, W) in [-1, 1], with its graph; t and eps are drawn here if None."""
    t = torch.randint(len(diffusion), x_0.shape[:1], device=x_0.device) if t is None else t
    eps = torch.randn_like(x_0) if eps is None else eps
    x_t = diffusion.q_sample(x_0, t, eps)
    output = net(x_t, t, *(() if context is None else (context,)))
    return diffusion.compute_losses(output, x_0, x_t, t, eps).mean()


def compute_learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of update 0, 1, ...: lr min(step / warmup_steps, 1), so the first one is 0 (authors' code).

    lr_decay="linear" multiplies by 1 - step / steps.
    """
    warmup = min(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    decay = max(1 - step / config.steps, 0.0) if config.lr_decay == "linear" else 1.0
    return config.lr * warmup * decay

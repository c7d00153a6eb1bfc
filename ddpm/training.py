"""Algorithm 1 with Adam, learning-rate warm-up, gradient clipping and EMA (Appendix B and the authors' code).

The one place that joins network and diffusion. Every random number is a function of (seed, stream, step,
row of the global batch), so neither the number of workers nor an interruption changes what is drawn.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm import images, rng
from ddpm.config import DiffusionConfig, TrainConfig
from ddpm.diffusion import Diffusion
from ddpm.ema import EMA
from ddpm.networks import NO_LABEL
from ddpm.rng import Stream
from ddpm.timesteps import ImportanceSampler


class TrainState:
    """Everything a run needs to go on: network, averages, Adam's moments, number of updates made.

    t_sampler: the history of losses that importance sampling of t goes by; None where t is uniform.
    """

    def __init__(
        self,
        net: nn.Module,
        emas: list[EMA],
        optimizer: torch.optim.Adam,
        t_sampler: ImportanceSampler | None = None,
    ) -> None:
        self.net, self.emas, self.optimizer, self.t_sampler = net, emas, optimizer, t_sampler
        self.step = 0

    @classmethod
    def create(
        cls, config: TrainConfig, net: nn.Module, diffusion: DiffusionConfig | None = None
    ) -> "TrainState":
        """The state before the first update. `net` is on its device and in its memory format already.

        diffusion is needed for t_sampling="importance" only.
        """
        emas = [EMA(net, decay, config.ema_warmup) for decay in config.ema_decay]
        t_sampler = None
        if diffusion is not None and diffusion.t_sampling == "importance":
            t_sampler = ImportanceSampler(diffusion.timesteps, next(net.parameters()).device)
        return cls(net, emas, _adam(net), t_sampler)

    def tensors(self) -> dict[str, Tensor]:
        """All of it: net.*, ema.<i>.*, adam.exp_avg.*, adam.exp_avg_sq.*, adam.step, t_sampler.* and step.

        The tensors are live, not copies (`step` apart): write or clone them before the next update.
        """
        found = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        for i, ema in enumerate(self.emas):
            found |= {f"ema.{i}.{name}": tensor for name, tensor in ema.tensors().items()}
        for name, p in self.net.named_parameters():
            moments = self.optimizer.state[p]
            found |= {f"adam.{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
            found["adam.step"] = moments["step"]  # the same for every parameter
        if self.t_sampler is not None:
            found["t_sampler.losses"] = self.t_sampler.losses
            found["t_sampler.counts"] = self.t_sampler.counts
        return found | {"step": torch.tensor(self.step)}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors()` gave, from any device.

        Raises ValueError naming the keys that are missing, unexpected or of another shape or type, and then
        changes nothing.
        """
        own = self.tensors()
        if faults := describe_mismatch(own, tensors):
            raise ValueError(f"the saved state is of another network or optimiser: {faults}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for moments in self.optimizer.state.values():
            moments["step"].copy_(tensors["adam.step"])
        self.step = int(tensors["step"])


def _adam(net: nn.Module) -> torch.optim.Adam:
    """Adam(0.9, 0.999, 1e-8) with its moments made now, so that a fresh state has all its tensors."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for p in net.parameters():
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def describe_mismatch(own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """Say in one line what keeps `given` from being loaded into `own`; empty if nothing does."""

    def kind(tensor: Tensor) -> str:
        return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    faults = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "different": [
            f"{name} is {kind(given[name])}, not {kind(own[name])}"
            for name in own
            if name in given and kind(own[name]) != kind(given[name])
        ],
    }
    return "; ".join(
        f"{len(names)} {fault} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for fault, names in faults.items()
        if names
    )


class Draws(NamedTuple):
    """What chance decides for each image.

    t int64 (N,); weight float32 (N,) of its loss, 1 where t is uniform; eps float32 (N, C, H, W); flip bool
    (N,).
    """

    t: Tensor
    weight: Tensor
    eps: Tensor
    flip: Tensor


def draw_batch(
    seed: int,
    step: int,
    rows: Tensor,
    shape: tuple[int, ...],
    timesteps: int,
    random_flip: bool,
    t_sampler: ImportanceSampler | None = None,
) -> Draws:
    """The draws of update `step` for rows (int64, (N,)) of the global batch, on the device of `rows`.

    shape: (C, H, W); t is uniform over 0..timesteps-1, or as t_sampler has it; flip has probability 1/2, or 0
    without random_flip.
    """
    if t_sampler is None:
        t = rng.integers(seed, Stream.TIMESTEP, step, rows, timesteps)
        weight = torch.ones(len(rows), device=rows.device)
    else:
        t, weight = t_sampler.sample(rng.uniform(seed, Stream.TIMESTEP, step, rows))
    eps = rng.normal(seed, Stream.NOISE, step, rows, shape, rows.device)
    flip = rng.integers(seed, Stream.FLIP, step, rows, 2) == 1
    return Draws(t, weight, eps, flip & random_flip)


def drop_labels(seed: int, step: int, rows: Tensor, labels: Tensor, share: float) -> Tensor:
    """labels (int64, (N,)) with that share of them, chosen by row, replaced by NO_LABEL."""
    dropped = rng.uniform(seed, Stream.LABEL, step, rows) < share
    return labels.masked_fill(dropped, NO_LABEL)


def train_step(
    state: TrainState,
    diffusion: Diffusion,
    x_0: Tensor,
    rows: Tensor,
    *,
    config: TrainConfig,
    seed: int,
    world_size: int = 1,
    forward: nn.Module | None = None,
    context: Tensor | None = None,
) -> dict[str, Tensor]:
    """One update on this worker's slice of the global batch (Algorithm 1).

    Never waits for the device (importance sampling of t apart).

    x_0: (N, C, H, W) on the network's device, uint8 or float in [-1, 1]; rows: int64 (N,) on the CPU,
    consecutive places in the global batch of config.batch_size; context: int64 labels (N,). `forward` is the
    network as it is called (wrapped by DDP or compiled); default the network itself. Slices may differ in
    length: each is weighted by it, so that DDP's average is the gradient of the mean over the global batch.

    Returns 0-d tensors: loss, so weighted that its mean over workers is the mean over the global batch, and
    grad_norm before clipping (with grad_clip_group, the mean norm of this worker's groups).
    """
    net = state.net if forward is None else forward
    parts = _parts(state, diffusion, x_0, rows, context, config, seed)
    state.optimizer.zero_grad(set_to_none=True)
    if config.grad_clip_group is None:
        losses = _backward(net, diffusion, parts, config, world_size)
        grad_norm = _clip(state.net, config.grad_clip)
    else:
        losses, grad_norm = _backward_clipped(net, diffusion, parts, config, world_size)
    if state.t_sampler is not None:
        _remember(state.t_sampler, parts, losses, rows, config.batch_size, world_size)
    _update(state, config)
    weight = torch.cat([part.weight for part in parts])
    return {"loss": (losses * weight).sum() * (world_size / config.batch_size), "grad_norm": grad_norm}


class _Part(NamedTuple):
    """Consecutive images that go through the network together."""

    x_0: Tensor
    t: Tensor
    weight: Tensor
    eps: Tensor
    context: Tensor | None
    dropout_seed: int


def _parts(
    state: TrainState,
    diffusion: Diffusion,
    x_0: Tensor,
    rows: Tensor,
    context: Tensor | None,
    config: TrainConfig,
    seed: int,
) -> list[_Part]:
    """Make the draws, flip, and cut the slice into `accumulate` parts or into groups for clipping."""
    if (diffusion.config.t_sampling == "importance") != (state.t_sampler is not None):
        raise ValueError("t_sampling=importance needs TrainState.create(config, net, diffusion.config)")
    step, on_device = state.step, rows.to(x_0.device, non_blocking=True)
    t, weight, eps, flip = draw_batch(
        seed, step, on_device, tuple(x_0.shape[1:]), len(diffusion), config.random_flip, state.t_sampler
    )
    x_0 = images.from_uint8(x_0) if x_0.dtype == torch.uint8 else x_0
    x_0 = torch.where(flip[:, None, None, None], x_0.flip(3), x_0)
    if context is not None:
        context = drop_labels(seed, step, on_device, context, config.label_dropout)
    return [
        _Part(
            x_0[cut],
            t[cut],
            weight[cut],
            eps[cut],
            None if context is None else context[cut],
            rng.torch_seed(seed, Stream.DROPOUT, step, int(rows[cut.start])),
        )
        for cut in _cuts(rows, config)
    ]


def _cuts(rows: Tensor, config: TrainConfig) -> list[slice]:
    group = config.grad_clip_group
    if group is None:
        ends = [len(rows) * (i + 1) // config.accumulate for i in range(config.accumulate)]
    elif len(rows) % group or int(rows[0]) % group:
        raise ValueError(
            f"grad_clip_group={group} cannot cut images {int(rows[0])} to {int(rows[-1])} of the batch into "
            "whole groups: choose a number of workers that gives each a multiple of it"
        )
    else:
        ends = list(range(group, len(rows) + 1, group))
    cuts = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return [cut for cut in cuts if cut.start < cut.stop]


def _losses(net: nn.Module, diffusion: Diffusion, part: _Part, precision: str) -> Tensor:
    """Loss per image (N,). bf16 is inside the network only: x_t, eps and the loss stay float32."""
    torch.manual_seed(part.dropout_seed)
    x_t = diffusion.q_sample(part.x_0, part.t, part.eps)
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = net(x_t, part.t, part.context)
    return diffusion.training_losses(output.float(), part.x_0, x_t, part.t, part.eps)


def _backward(
    net: nn.Module, diffusion: Diffusion, parts: list[_Part], config: TrainConfig, world_size: int
) -> Tensor:
    """Leave the gradient in p.grad, averaged by DDP on the last part only; return the losses (N,)."""
    no_sync = getattr(net, "no_sync", nullcontext)
    found = []
    for part in parts:
        with nullcontext() if part is parts[-1] else no_sync():
            losses = _losses(net, diffusion, part, config.precision)
            # DDP divides by world_size
            ((losses * part.weight).sum() * (world_size / config.batch_size)).backward()
        found.append(losses.detach())
    return torch.cat(found)


def _backward_clipped(
    net: nn.Module, diffusion: Diffusion, parts: list[_Part], config: TrainConfig, world_size: int
) -> tuple[Tensor, Tensor]:
    """The mean over groups of each group's clipped gradient, as the authors' eight cores made it.

    DDP cannot clip before it averages, so its inner network is called and the sum over workers taken here.
    """
    assert config.grad_clip is not None  # TrainConfig.problems
    net = getattr(net, "module", net)
    parameters = list(net.parameters())
    mean = [torch.zeros_like(p) for p in parameters]
    found, norms = [], []
    for part in parts:
        losses = _losses(net, diffusion, part, config.precision)
        gradient = torch.autograd.grad((losses * part.weight).mean(), parameters)
        norm = nn.utils.get_total_norm(gradient)
        share = _clip_factor(norm, config.grad_clip) * (len(part.t) / config.batch_size)
        torch._foreach_add_(mean, torch._foreach_mul(gradient, share))
        found.append(losses.detach())
        norms.append(norm)
    if world_size > 1:
        _all_reduce(mean)
    for p, gradient_mean in zip(parameters, mean, strict=True):
        p.grad = gradient_mean
    return torch.cat(found), torch.stack(norms).mean()


def _remember(
    t_sampler: ImportanceSampler,
    parts: list[_Part],
    losses: Tensor,
    rows: Tensor,
    batch_size: int,
    world_size: int,
) -> None:
    """Give the history the whole global batch, in its order, so that every worker holds the same."""
    batch = torch.zeros(2, batch_size, dtype=torch.float64, device=losses.device)
    batch[0, rows[0] : rows[-1] + 1] = torch.cat([part.t for part in parts]).double()
    batch[1, rows[0] : rows[-1] + 1] = losses.double()
    if world_size > 1:
        dist.all_reduce(batch)
    t_sampler.update(batch[0].long(), batch[1].float())


def _all_reduce(tensors: list[Tensor]) -> None:
    """Sum over workers in place, as one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view(tensor.shape))


def _clip(net: nn.Module, grad_clip: float | None) -> Tensor:
    """Scale the gradient to a norm of at most grad_clip; return the norm it had."""
    gradient = [p.grad for p in net.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradient)
    if grad_clip is not None:
        torch._foreach_mul_(gradient, _clip_factor(norm, grad_clip))
    return norm


def _clip_factor(norm: Tensor, grad_clip: float) -> Tensor:
    """min(grad_clip / norm, 1), left on the device."""
    return grad_clip / norm.clamp(min=grad_clip)


def _update(state: TrainState, config: TrainConfig) -> None:
    if any(p.stride() != moments["exp_avg"].stride() for p, moments in state.optimizer.state.items()):
        # The fused kernel walks raw memory and would pair weights with the moments of others.
        raise RuntimeError("the network's memory format changed after TrainState.create: change it before")
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimizer.step()
    for ema in state.emas:
        ema.update(state.net, state.step)
    state.step += 1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of update step = 0, 1, ...: lr min(step / warmup_steps, 1), so the first one is 0 (authors' code).

    lr_decay="linear" multiplies by 1 - step / steps.
    """
    warmup = min(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    decay = max(1 - step / config.steps, 0.0) if config.lr_decay == "linear" else 1.0
    return config.lr * warmup * decay

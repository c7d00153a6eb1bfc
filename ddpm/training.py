"""Algorithm 1 with Adam, learning-rate warm-up, gradient clipping and EMA (Appendix B and the authors' code).

The one place that joins network and diffusion. Every random number is a function of (seed, stream, step,
row of the global batch), so neither the number of workers nor an interruption changes what is drawn.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm import images, rng
from ddpm.diffusion import Diffusion
from ddpm.ema import EMA
from ddpm.rng import Stream

NO_LABEL = -1  # what a dropped label becomes


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained. Values live in the experiment's yaml; all counts are global, not per worker.

    accumulate: parts into which a worker's slice is cut; grad_clip: largest norm of the averaged gradient,
    or of each group of grad_clip_group consecutive images before averaging (authors' code: 16);
    label_dropout: share of labels replaced by NO_LABEL; deterministic, checkpoint_every, sample_every (0:
    never), keep and log_every are read by the training loop around `train_step`.
    """

    steps: int
    batch_size: int
    accumulate: int
    random_flip: bool
    lr: float
    lr_decay: Literal["none", "linear"]
    warmup_steps: int
    grad_clip: float | None
    grad_clip_group: int | None
    ema_decay: tuple[float, ...]
    ema_warmup: bool
    label_dropout: float
    precision: Literal["fp32", "bf16"]
    deterministic: bool
    checkpoint_every: int
    sample_every: int
    keep: int
    log_every: int

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with these settings: (key, message) pairs; f"{key} {message}" is one line."""
        found = [
            (key, f"must be at least 1, not {getattr(self, key)}")
            for key in ("steps", "batch_size", "accumulate", "checkpoint_every", "keep", "log_every")
            if getattr(self, key) < 1
        ]
        found += [
            (key, f"must be at least 0, not {getattr(self, key)}")
            for key in ("warmup_steps", "sample_every")
            if getattr(self, key) < 0
        ]
        if self.lr_decay not in ("none", "linear"):
            found.append(("lr_decay", f"must be none or linear, not {self.lr_decay}"))
        if self.precision not in ("fp32", "bf16"):
            found.append(("precision", f"must be fp32 or bf16, not {self.precision}"))
        if not (self.lr > 0 and math.isfinite(self.lr)):
            found.append(("lr", f"must be positive, not {self.lr}"))
        if not 0 <= self.label_dropout <= 1:
            found.append(("label_dropout", f"must lie in [0, 1], not {self.label_dropout}"))
        if not self.ema_decay or not all(0 <= decay < 1 for decay in self.ema_decay):
            found.append(("ema_decay", "must be one or several values in [0, 1)"))
        if self.accumulate > self.batch_size:
            found.append(("accumulate", f"cannot cut {self.batch_size} images into {self.accumulate} parts"))
        return found + self._clip_problems()

    def _clip_problems(self) -> list[tuple[str, str]]:
        found = []
        if self.grad_clip is not None and not self.grad_clip > 0:
            found.append(("grad_clip", f"must be positive or null, not {self.grad_clip}"))
        group = self.grad_clip_group
        if group is None:
            return found
        if self.grad_clip is None:
            found.append(("grad_clip_group", "needs grad_clip, the norm each group is clipped to"))
        if group < 1 or self.batch_size % group:
            found.append(("grad_clip_group", f"{group} does not divide the batch of {self.batch_size}"))
        if self.accumulate > 1:
            found.append(("grad_clip_group", "already runs group by group: set accumulate to 1"))
        return found


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of update step = 0, 1, ...: lr min(step / warmup_steps, 1), so the first one is 0 (authors' code).

    lr_decay="linear" multiplies by 1 - step / steps.
    """
    warmup = min(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    decay = max(1 - step / config.steps, 0.0) if config.lr_decay == "linear" else 1.0
    return config.lr * warmup * decay


class TrainState:
    """Everything a run needs to go on: network, averages, Adam's moments, number of updates made."""

    def __init__(self, net: nn.Module, emas: list[EMA], optimizer: torch.optim.Adam, step: int = 0) -> None:
        self.net, self.emas, self.optimizer, self.step = net, emas, optimizer, step

    @classmethod
    def create(cls, config: TrainConfig, net: nn.Module) -> "TrainState":
        """The state before the first update. `net` is on its device and in its memory format already."""
        emas = [EMA(net, decay, config.ema_warmup) for decay in config.ema_decay]
        return cls(net, emas, _adam(net))

    def tensors(self) -> dict[str, Tensor]:
        """All of it: net.*, ema.<i>.*, adam.exp_avg.*, adam.exp_avg_sq.*, adam.step and step.

        The tensors are live, not copies (`step` apart): write or clone them before the next update.
        """
        found = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        for i, ema in enumerate(self.emas):
            found |= {f"ema.{i}.{name}": tensor for name, tensor in ema.tensors().items()}
        for name, p in self.net.named_parameters():
            moments = self.optimizer.state[p]
            found |= {f"adam.{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
            found["adam.step"] = moments["step"]  # the same for every parameter
        return found | {"step": torch.tensor(self.step)}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors()` gave, from any device.

        Raises ValueError naming the keys that are missing, unexpected or of another shape or type, and then
        changes nothing.
        """
        own = self.tensors()
        if faults := _mismatches(own, tensors):
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


def _mismatches(own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """What keeps `given` from being loaded into `own`, in one line; empty if nothing does."""

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
    """What chance decides for each image: t int64 (N,), eps float32 (N, C, H, W), flip bool (N,)."""

    t: Tensor
    eps: Tensor
    flip: Tensor


def draw_batch(
    seed: int, step: int, rows: Tensor, shape: tuple[int, ...], timesteps: int, random_flip: bool
) -> Draws:
    """The draws of update `step` for rows (int64, (N,)) of the global batch, on the device of `rows`.

    shape: (C, H, W); t is uniform over 0..timesteps-1; flip has probability 1/2, or 0 without random_flip.
    """
    t = rng.integers(seed, Stream.TIMESTEP, step, rows, timesteps)
    eps = rng.normal(seed, Stream.NOISE, step, rows, shape, rows.device)
    flip = rng.integers(seed, Stream.FLIP, step, rows, 2) == 1
    return Draws(t, eps, flip & random_flip)


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
    """One update on this worker's slice of the global batch (Algorithm 1). Never waits for the device.

    x_0: (N, C, H, W) on the network's device, uint8 or float in [-1, 1]; rows: int64 (N,) on the CPU,
    consecutive places in the global batch of config.batch_size; context: int64 labels (N,). `forward` is the
    network as it is called (wrapped by DDP or compiled); default the network itself. Slices may differ in
    length: each is weighted by it, so that DDP's average is the gradient of the mean over the global batch.

    Returns 0-d tensors: loss, so weighted that its mean over workers is the mean over the global batch, and
    grad_norm before clipping (with grad_clip_group, the mean norm of this worker's groups).
    """
    net = state.net if forward is None else forward
    parts = _parts(state.step, diffusion, x_0, rows, context, config, seed)
    state.optimizer.zero_grad(set_to_none=True)
    if config.grad_clip_group is None:
        loss = _backward(net, diffusion, parts, config, world_size)
        grad_norm = _clip(state.net, config.grad_clip)
    else:
        loss, grad_norm = _backward_clipped(net, diffusion, parts, config, world_size)
    _update(state, config)
    return {"loss": loss, "grad_norm": grad_norm}


class _Part(NamedTuple):
    """Consecutive images that go through the network together."""

    x_0: Tensor
    t: Tensor
    eps: Tensor
    context: Tensor | None
    dropout_seed: int


def _parts(
    step: int,
    diffusion: Diffusion,
    x_0: Tensor,
    rows: Tensor,
    context: Tensor | None,
    config: TrainConfig,
    seed: int,
) -> list[_Part]:
    """Make the draws, flip, and cut the slice into `accumulate` parts or into groups for clipping."""
    on_device = rows.to(x_0.device, non_blocking=True)
    shape = tuple(x_0.shape[1:])
    t, eps, flip = draw_batch(seed, step, on_device, shape, len(diffusion), config.random_flip)
    x_0 = images.from_uint8(x_0) if x_0.dtype == torch.uint8 else x_0
    x_0 = torch.where(flip[:, None, None, None], x_0.flip(3), x_0)
    if context is not None:
        context = drop_labels(seed, step, on_device, context, config.label_dropout)
    return [
        _Part(
            x_0[cut],
            t[cut],
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
    """Leave the gradient in p.grad, averaged by DDP on the last part only; return this worker's loss."""
    no_sync = getattr(net, "no_sync", nullcontext)
    weight = world_size / config.batch_size  # DDP divides by world_size
    loss = torch.zeros((), device=parts[0].x_0.device)
    for part in parts:
        with nullcontext() if part is parts[-1] else no_sync():
            share = _losses(net, diffusion, part, config.precision).sum() * weight
            share.backward()
        loss += share.detach()
    return loss


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
    losses, norms = [], []
    for part in parts:
        loss = _losses(net, diffusion, part, config.precision).mean()
        gradient = torch.autograd.grad(loss, parameters)
        norm = nn.utils.get_total_norm(gradient)
        share = _clip_factor(norm, config.grad_clip) * (len(part.t) / config.batch_size)
        torch._foreach_add_(mean, torch._foreach_mul(gradient, share))
        losses.append(loss.detach())
        norms.append(norm)
    if world_size > 1:
        _all_reduce(mean)
    for p, gradient_mean in zip(parameters, mean, strict=True):
        p.grad = gradient_mean
    images_here = sum(len(part.t) for part in parts)
    weight = images_here * world_size / config.batch_size
    return torch.stack(losses).mean() * weight, torch.stack(norms).mean()


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

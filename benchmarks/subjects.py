"""The networks and loops that compete: this project's, diffusers', denoising-diffusion-pytorch's."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import nn

from benchmarks.harness import Contender, Settings, Skipped
from ddpm import Diffusion, TrainConfig, TrainState, UNetConfig, build_network, train_step
from ddpm.config import Precision
from ddpm.graphs import RecordedGradients, prepare_network
from ddpm.kernels import accelerate
from ddpm.precision import autocast, use_deterministic

PAPER = UNetConfig()
SIDE = 32

TRAIN = TrainConfig(
    steps=10**6, batch_size=0, accumulate=1, random_flip=True, lr=2e-4, lr_decay="none", warmup_steps=5000,
    grad_clip=1.0, ema_decay=(0.9999,), ema_warmup=False, label_dropout=0.0, precision="fp32",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Way:
    """How a network is run. default: as its authors' own script does it, but with cuDNN's search for the fastest
    kernels, which all have; else their fastest setting. deterministic, fused, graph: as the keys of these names."""

    precision: Precision
    channels_last: bool = True
    compiled: Literal["", "compiled", "CUDA graphs"] = ""
    default: bool = False
    deterministic: bool = False
    fused: bool = False
    graph: bool = False

    def __str__(self) -> str:
        words = [
            self.precision,
            "channels_last" if self.channels_last else "",
            self.compiled,
            "deterministic" if self.deterministic else "",
            "fused" if self.fused else "",
            "graph" if self.graph else "",
        ]
        return ("default " if self.default else "") + " ".join(filter(None, words))

    def place(self, net: nn.Module, device: torch.device) -> nn.Module:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return net.to(device).to(memory_format=memory_format)

    def call(self, net: nn.Module) -> Any:
        if not self.compiled:
            return net
        return torch.compile(net, mode="reduce-overhead" if self.compiled == "CUDA graphs" else None)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        return autocast(self.precision, device)


FASTEST = Way("bf16", fused=True, graph=True)  # of ours, on a GPU


def our_network(device: torch.device, fused: bool = False) -> nn.Module:
    config = dataclasses.replace(PAPER, fused=fused)
    return Way("fp32").place(accelerate(build_network(config, SIDE, 3, 3, seed=0)), device)


def our_train_step(settings: Settings, way: Way, batch: int) -> Callable[[], Any]:
    """One step as the train stage makes it: draws, flips, loss, clipping, Adam, EMA; images lie as uint8."""
    train = dataclasses.replace(TRAIN, batch_size=batch, precision=way.precision)
    net = our_network(settings.device, way.fused)
    diffusion = Diffusion().to(settings.device)
    state = TrainState(train, net, diffusion.config)
    images = torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8, device=settings.device)
    forward, rows = way.call(net), torch.arange(batch)
    compute = RecordedGradients() if way.graph else None

    def step() -> None:
        with use_deterministic(way.deterministic):
            train_step(state, diffusion, images, rows, config=train, seed=0, forward=forward, compute=compute)

    return step


def our_forward(settings: Settings, way: Way, batch: int) -> Callable[[], Any]:
    return forward_of(make_sampler(settings, way), settings, way, batch)


def make_sampler(settings: Settings, way: Way) -> nn.Module:
    """Return the network as the sample stage calls it."""
    net = our_network(settings.device, way.fused).eval().requires_grad_(False)
    return prepare_network(way.call(net), way.precision, settings.device, way.graph)


def diffusers_network() -> nn.Module:
    """diffusers' UNet2DModel of the same shape, as of google/ddpm-cifar10-32."""
    from diffusers import UNet2DModel

    attended = [side in PAPER.attention_resolutions for side in PAPER.list_sides(SIDE)]
    return UNet2DModel(
        sample_size=SIDE, in_channels=3, out_channels=3, block_out_channels=PAPER.widths,
        layers_per_block=PAPER.num_res_blocks,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        downsample_padding=0, norm_eps=1e-6, norm_num_groups=PAPER.norm_groups, flip_sin_to_cos=False,
        freq_shift=1, attention_head_dim=None, dropout=PAPER.dropout,
    )  # fmt: skip


def diffusers_train_step(settings: Settings, way: Way, batch: int) -> Callable[[], Any]:
    """The body of diffusers' unconditional training script: DDPMScheduler, AdamW, clipping at 1, EMAModel."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    net = way.place(diffusers_network(), settings.device).train()
    call, scheduler = way.call(net), DDPMScheduler(num_train_timesteps=1000)
    fast = {} if way.default else {"foreach": True}
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=False, **fast)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=None if way.default else True)
    x_0 = torch.rand(batch, 3, SIDE, SIDE, device=settings.device) * 2 - 1

    def step() -> None:
        noise = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (batch,), device=settings.device)
        with way.autocast(settings.device):
            output = call(scheduler.add_noise(x_0, noise, t), t).sample
        nn.functional.mse_loss(output.float(), noise).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())

    return step


def diffusers_forward(settings: Settings, way: Way, batch: int) -> Callable[[], Any]:
    net = way.place(diffusers_network(), settings.device).eval().requires_grad_(False)
    return forward_of(way.call(net), settings, way, batch)


def lucidrains_network() -> nn.Module:
    """denoising-diffusion-pytorch's own U-Net at width 128 x (1, 2, 2, 2): another network."""
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=PAPER.channels, dim_mults=PAPER.channel_mult, dropout=PAPER.dropout)


def lucidrains_train_step(settings: Settings, way: Way, batch: int) -> Callable[[], Any]:
    """The body of its Trainer: Adam, clipping at 1, ema_pytorch every 10 steps."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    net = way.place(lucidrains_network(), settings.device).train()
    loss_of = GaussianDiffusion(net, image_size=SIDE, timesteps=1000, objective="pred_noise").to(
        settings.device
    )
    loss_of.model = way.call(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(net, beta=0.995, update_every=10)
    x_0 = torch.rand(batch, 3, SIDE, SIDE, device=settings.device)

    def step() -> None:
        with way.autocast(settings.device):
            loss = loss_of(x_0)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step


def lucidrains_forward(settings: Settings, way: Way, batch: int) -> Callable[[], Any]:
    net = way.place(lucidrains_network(), settings.device).eval().requires_grad_(False)
    return forward_of(way.call(net), settings, way, batch)


def forward_of(net: Callable[..., Any], settings: Settings, way: Way, batch: int) -> Callable[[], Any]:
    x = torch.randn(batch, 3, SIDE, SIDE, device=settings.device)
    t = torch.randint(0, 1000, (batch,), device=settings.device)

    @torch.no_grad()
    def call() -> Any:
        with way.autocast(settings.device):
            return net(x, t)

    return call


def ways(settings: Settings, precision: Precision) -> list[Way]:
    """The settings that help. Not compiled on a CPU: that made training many times slower there."""
    found = [Way(precision)]
    if settings.on_gpu and precision == "bf16":
        found += [Way(precision, compiled="compiled"), Way(precision, compiled="CUDA graphs")]
    return found


def list_precisions(settings: Settings) -> list[Precision]:
    """A CPU has no TF32."""
    return [name for name in reversed(get_args(Precision)) if settings.on_gpu or name != "tf32"]


def contender(
    settings: Settings, name: str, make: Callable[[], Callable[[], Any]], items: float
) -> Callable[[], list[Contender]]:
    """A maker that calls the contender once: one that cannot run is left out, and not the whole race."""

    def maker() -> list[Contender]:
        if time.monotonic() > settings.deadline:
            raise Skipped(f"{name}: the time is up")
        try:
            call = make()
            call()
        except ImportError:
            raise
        except Exception as error:
            raise Skipped(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}") from error
        return [Contender(name, call, items)]

    return maker

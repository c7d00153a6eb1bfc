"""A trained network with its diffusion: built from plain settings and tensors, and drawn from in one call."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ddpm import sampler
from ddpm.config import DiffusionConfig
from ddpm.denoisers import PosteriorMean
from ddpm.diffusion import Diffusion, Network
from ddpm.kernels import accelerate
from ddpm.networks import NO_LABEL, UNTRAINED, find_config_class
from ddpm.networks.build import allocate_weights, build_network
from ddpm.networks.config import NetworkConfig
from ddpm.rng import Stream, draw_normal
from ddpm.training import describe_mismatch

Label = int | str | Sequence[float] | Tensor | None
Config = TypeVar("Config")


@dataclass(frozen=True)
class Model:
    """A trained network and its diffusion, ready to draw.

    net: called net(x_t, t, context=None), in evaluation mode; shape: (C, H, W) of an image; num_classes: 0 if it
    takes no labels. options: how its run draws: seed, label, guidance_scale, and keywords of `run_image_chains`; the
    methods that draw take other values for them. source: where the model comes from.
    """

    diffusion: Diffusion
    net: nn.Module
    shape: tuple[int, int, int]
    num_classes: int
    options: Mapping[str, Any]
    source: str

    def __repr__(self) -> str:
        net = f"{type(self.net).__name__} of {sum(p.numel() for p in self.net.parameters()):,} parameters"
        parts = [net, repr(self.diffusion), "images " + "x".join(map(str, self.shape))]
        parts += [f"{self.num_classes} classes"] if self.num_classes else []
        return f"Model({self.source}: {', '.join(parts)})"

    @property
    def device(self) -> torch.device:
        tensors: Iterable[Tensor] = self.net.state_dict().values()
        return next(iter(tensors)).device

    def to(self, device: torch.device | str) -> "Model":
        """Return the model on a device. Its network is moved, not copied."""
        return replace(self, net=self.net.to(device), diffusion=self.diffusion.to(device))

    def run_chains(self, index: Tensor, **options: Any) -> Iterator[sampler.ReverseStep]:
        """Run the reverse process of the images index (int64, (N,)), a function of seed and index alone."""
        asked = {**self.options, **options}
        context = self.make_context(asked.pop("label"), index)
        net = self.guide(context, asked.pop("guidance_scale"))
        return sampler.run_image_chains(
            self.diffusion, net, index=index, shape=self.shape, context=context, **asked
        )

    def guide(self, context: Tensor | None, scale: float) -> Network:
        """Return the network, with guidance towards the context if scale is not 1."""
        if context is None or scale == 1:
            return self.net
        return sampler.add_guidance(self.net, scale, 0 if context.is_floating_point() else NO_LABEL)

    def sample(self, n: int, *, first: int = 0, batch_size: int = 64, **options: Any) -> Tensor:
        """Draw images first..first+n-1, (n, C, H, W), in [-1, 1] unless clip=False; without options, the run's own."""
        asked, index = {**self.options, **options}, torch.arange(first, first + n, device=self.device)
        context = self.make_context(asked["label"], index)
        images = []
        for rows in torch.arange(n).split(batch_size):
            asked["label"] = None if context is None else context[rows]
            images.append(sampler.run_to_end(self.run_chains(index[rows], **asked)))
        return torch.cat(images).clamp(-1, 1) if asked.get("clip", True) else torch.cat(images)

    def interpolate(
        self, x_a: Tensor, x_b: Tensor, weights: Sequence[float] = (0.5,), at: int | None = None, *,
        number: int = 0, label: Label = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Draw an image between x_a and x_b (C, H, W), in [-1, 1], for each lambda of `weights`: (K, C, H, W).

        at: the t of 1..T at which the latents are mixed, default T / 2; 0 mixes the pixels. number: the index of the
        noise, which all images share. There is no guidance. Raises ValueError for arguments that do not fit.
        """
        asked, timesteps = {**self.options, **options}, len(self.diffusion)
        at = timesteps // 2 if at is None else at
        if not 0 <= at <= timesteps:
            raise ValueError(f"at must lie in 0..{timesteps}, got {at}")
        if wrong := [tuple(x.shape) for x in (x_a, x_b) if x.shape != self.shape]:
            raise ValueError(f"this network draws images of shape {self.shape}, not {wrong[0]}")
        steps = min(at, max(1, round(at * (asked["steps"] or timesteps) / timesteps)))
        chain = self.diffusion.respace(range(max(at, 1)))
        chain = chain.respace(sampler.space_timesteps(chain, max(steps, 1)))
        index, shape = torch.tensor([number], device=self.device), (len(weights), *self.shape)

        def noise(t: int) -> Tensor:
            return draw_normal(asked["seed"], Stream.FIGURES, t, index, self.shape).expand(shape)

        clip = asked.get("clip", True)
        images = sampler.interpolate(
            chain, self.net, x_a.to(self.device).expand(shape), x_b.to(self.device).expand(shape),
            torch.tensor(weights, device=self.device), steps, noise(timesteps), noise,
            variance=sampler.choose_ancestral_variance(asked["sampler"], asked["variance"]),
            context=self.make_context(label, index.expand(len(weights))), clip=clip,
        )  # fmt: skip
        return images.clamp(-1, 1) if clip else images

    def make_context(self, label: Label, index: Tensor) -> Tensor | None:
        """Return the context of images index (N,): labels int64 (N,), or vectors (N, num_classes); None for none.

        label: a class, NO_LABEL, "cycle" (each class in turn), one for each image, or a vector such as a mixture of
        classes. Raises ValueError for what the network does not know.
        """
        if label is None:
            return None
        if not self.num_classes:
            raise ValueError("this network takes no labels")
        if label == "cycle":
            return index % self.num_classes
        context = torch.as_tensor(label, device=index.device)
        if context.is_floating_point():
            if context.shape[-1:] != (self.num_classes,) or not bool(context.isfinite().all()):
                raise ValueError(f"a context vector here has {self.num_classes} numbers, not {label}")
            return context.float().expand(len(index), -1)
        if not bool(((context == NO_LABEL) | (context >= 0) & (context < self.num_classes)).all()):
            raise ValueError(f"the labels of this network are 0 to {self.num_classes - 1}, not {label}")
        return context.expand(len(index))


def build_model(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> Model:
    """Build a trained model from plain settings, as JSON keeps them, and the tensors of its network.

    settings: `diffusion` and `model`, the fields of their dataclasses; shape, num_classes, options and source of
    `Model`. Raises ValueError if the tensors are another network's.
    """
    diffusion = Diffusion(_make_config(DiffusionConfig, settings["diffusion"]))
    config = _make_config(find_config_class(settings["model"]["name"]), settings["model"])
    shape, classes = tuple(settings["shape"]), settings["num_classes"]
    known = len(tensors.get("images", ()))
    net = create_network(config, diffusion, shape, classes, "meta", known_images=known)
    if fault := describe_mismatch(net.state_dict(), dict(tensors)):
        raise ValueError(f"the weights are of another network than the settings: {fault}")
    net = allocate_weights(net, "cpu")
    net.load_state_dict(tensors)
    net = net.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Model(diffusion.to(device), net, shape, classes, settings["options"], settings["source"])


def create_network(
    config: NetworkConfig, diffusion: Diffusion, shape: tuple[int, int, int], num_classes: int = 0,
    device: torch.device | str = "cpu", *, seed: int = 0, known_images: int = 0,
) -> nn.Module:  # fmt: skip
    """Create the network of `config` for images of this shape (C, H, W), with its initial weights.

    known_images: how many model.name=exact knows, all zero here.
    """
    channels, side, _ = shape
    if config.name in UNTRAINED:
        return PosteriorMean(diffusion, torch.zeros(known_images, *shape, dtype=torch.uint8, device=device))
    outputs = diffusion.count_output_channels(channels)
    net = build_network(config, side, channels, outputs, seed, num_classes, device, len(diffusion))
    return accelerate(net)


def _make_config(kind: Callable[..., Config], values: Mapping[str, Any]) -> Config:
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

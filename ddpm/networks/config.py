"""The settings of the networks. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol

from ddpm.config import Count, Few, Problems, Range, Width, find_value_problems


class NetworkConfig(Protocol):
    """Interface of the settings of every network."""

    @property
    def name(self) -> str: ...

    @property
    def takes_labels(self) -> bool: ...

    def find_problems(self, image_size: int) -> Problems:
        """Find problems of these settings for images of this side."""


@dataclass(frozen=True)
class ExactConfig:
    """The empty settings of a `PosteriorMean`, the best denoiser of the training images."""

    name: Literal["exact"] = "exact"
    takes_labels: ClassVar[bool] = False

    def find_problems(self, image_size: int) -> Problems:
        return []  # it takes images of any side


class LevelsConfig:
    """Settings of networks with levels; each level has half the side of the one before.

    channels: width of the first level; channel_mult: each level's width over it, finest level first.
    """

    channels: int
    channel_mult: tuple[int, ...]
    level_key: ClassVar[str] = "channel_mult"  # the setting with a value for each level
    least_levels: ClassVar[int] = 1
    takes_labels: ClassVar[bool] = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level on the way down, finest first."""
        return tuple(self.channels * mult for mult in self.channel_mult)

    def find_problems(self, image_size: int) -> Problems:
        """Find values out of range, levels that do not fit, and widths that norm_groups does not divide."""
        found, levels, key = find_value_problems(self), len(self.widths), self.level_key
        norm_groups, least = getattr(self, "norm_groups", 1), self.least_levels
        for name in ("channels", "pos_dim", "time_width"):
            if getattr(self, name, 0) % 2:
                found.append((name, f"must be even, not {getattr(self, name)}"))
        if levels < least:
            found.append((key, f"must hold a value for each of {least} or more levels"))
        factor = 2 ** max(levels - 1, 0)
        if image_size < 1 or image_size % factor:
            need = f"need an image size divisible by {factor}, not {image_size}"
            found.append((key, f"has {levels} levels, which {need}"))
        if norm_groups < 1 or any(width % norm_groups for width in self.widths):
            widths = ", ".join(map(str, self.widths))
            found.append(("norm_groups", f"{norm_groups} does not divide every width ({widths})"))
        return found


@dataclass(frozen=True)
class UNetConfig(LevelsConfig):
    """Settings of a `UNet`; the defaults are the paper's CIFAR-10 network (35,746,307 parameters).

    attention_resolutions: the image sides at which every residual block is followed by attention;
    resample: upsampling by "conv" (nearest, then 3x3, the paper) or "transposed" convolution (4x4, stride 2);
    class_conditional: an embedding of the label is added to that of t (not the paper's; Nichol and Dhariwal 2021);
    recompute: of so many levels, finest first, training keeps the inputs of blocks and computes the rest again.
    fused: on CUDA, compute norm, swish and dropout in one kernel; equal up to rounding.
    """

    name: Literal["unet"] = "unet"
    channels: Width = 128
    channel_mult: tuple[Few, ...] = (1, 2, 2, 2)
    num_res_blocks: Few = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.1
    norm_groups: Count = 32
    resample: Literal["conv", "transposed"] = "conv"
    class_conditional: bool = False
    recompute: Annotated[int, Range(ge=0, le=64)] = 0
    fused: bool = False

    norm_eps: ClassVar[float] = 1e-6  # authors' code; PyTorch's default is 1e-5

    @property
    def takes_labels(self) -> bool:  # type: ignore[override]
        return self.class_conditional

    @property
    def pos_dim(self) -> int:
        return self.channels

    @property
    def emb_dim(self) -> int:
        return 4 * self.channels

    def list_attending(self, image_size: int) -> list[bool]:
        return [side in self.attention_resolutions for side in self.list_sides(image_size)]

    def list_sides(self, image_size: int) -> tuple[int, ...]:
        return tuple(image_size >> level for level in range(len(self.channel_mult)))

    def find_problems(self, image_size: int) -> Problems:
        found = super().find_problems(image_size)
        sides = self.list_sides(image_size)
        fault = f"is the side of no level: choose among {', '.join(map(str, sides))}"
        strays = [side for side in self.attention_resolutions if side not in sides]
        return found + [("attention_resolutions", f"{side} {fault}") for side in strays]


@dataclass(frozen=True)
class ApiUNetConfig(LevelsConfig):
    """Settings of an `ApiUNet`; the defaults are the document's (32,416,643 parameters).

    pos_dim, emb_dim: widths of the sinusoids of t and of their embedding; channels_per_depth: the width of each
    level, the finest is depth 1; attention_depths: where every residual block is followed by attention;
    attention_residual: attention adds to its "input", or to that "normed". Each head has the full width.
    """

    name: Literal["api_unet"] = "api_unet"
    pos_dim: Width = 128
    emb_dim: Width = 512
    channels_per_depth: tuple[Width, ...] = (128, 256, 256, 256)
    num_res_blocks: Few = 2
    attention_depths: tuple[Few, ...] = (2,)
    attention_residual: Literal["input", "normed"] = "input"
    num_heads: Few = 1
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.1
    norm_groups: Count = 32
    norm_eps: ClassVar[float] = 1e-5
    recompute: ClassVar[int] = 0
    fused: ClassVar[bool] = False
    resample: ClassVar[str] = "conv"
    level_key: ClassVar[str] = "channels_per_depth"

    @property
    def widths(self) -> tuple[int, ...]:
        return self.channels_per_depth

    def list_attending(self, image_size: int) -> list[bool]:
        return [depth in self.attention_depths for depth in range(1, len(self.widths) + 1)]

    def find_problems(self, image_size: int) -> Problems:
        found = super().find_problems(image_size)
        fault = f"is no depth: choose among 1 to {len(self.widths)}"
        strays = [depth for depth in self.attention_depths if depth > len(self.widths)]
        return found + [("attention_depths", f"{depth} {fault}") for depth in strays]


@dataclass(frozen=True)
class AnnotatedUNetConfig(ApiUNetConfig):
    """Settings of an `AnnotatedUNet`; the defaults are the document's (168,898,883 parameters)."""

    name: Literal["annotated_unet"] = "annotated_unet"  # type: ignore[assignment]
    pos_dim: Width = 64
    emb_dim: Width = 256
    channels_per_depth: tuple[Width, ...] = (64, 128, 256, 1024)
    attention_depths: tuple[Few, ...] = (3, 4)
    attention_residual: Literal["input", "normed"] = "normed"
    resample: ClassVar[str] = "transposed"


@dataclass(frozen=True)
class ContextUNetConfig(LevelsConfig):
    """Settings of a `ContextUNet`; the defaults are the document's for 16x16.

    norm: of the residual blocks ("batch" is the published one; its result depends on who shares a batch);
    norm_groups: groups of every GroupNorm, which the pooled vector's way back and the head have always.
    """

    name: Literal["context_unet"] = "context_unet"
    channels: Width = 64
    channel_mult: tuple[Few, ...] = (1, 1, 2)
    norm: Literal["batch", "group"] = "batch"
    norm_groups: Count = 8
    takes_labels: ClassVar[bool] = True
    least_levels: ClassVar[int] = 2


@dataclass(frozen=True)
class MHAUNetConfig(LevelsConfig):
    """Settings of an `MHAUNet`; the defaults are the document's (14,553,731 parameters).

    num_heads: of every attention; time_width: of the sinusoids of t; form: the blocks of the document, or of the
    larger "tutorial" whose time_width is 256: a residual double convolution more, gelu, no biases.
    """

    name: Literal["mha_unet"] = "mha_unet"
    channels: Width = 64
    channel_mult: tuple[Few, ...] = (1, 2, 4, 4)
    num_heads: Count = 4
    time_width: Width = 128
    form: Literal["document", "tutorial"] = "document"
    least_levels: ClassVar[int] = 2

    @property
    def up_widths(self) -> tuple[int, ...]:
        """Channels of the output of the bottleneck and of each decoder level, coarsest first.

        Each but the last is the width of the skip it is joined with.
        """
        return (*self.widths[-2::-1], self.widths[0])

    def find_problems(self, image_size: int) -> Problems:
        found = super().find_problems(image_size)
        if self.num_heads < 1 or self.channels % self.num_heads:
            found.append(("num_heads", f"{self.num_heads} does not divide the {self.channels} channels"))
        return found

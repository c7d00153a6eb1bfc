"""A custom network for the digits: a few convolutions that know the timestep and the class."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Convolutions of one width, each with a residual. The program fills in the first four arguments."""

    takes_labels = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_classes: int,
        timesteps: int,
        *,
        width: int = 48,
        depth: int = 6,
    ) -> None:
        super().__init__()
        self.time, self.label = nn.Embedding(timesteps, width), nn.Embedding(num_classes + 1, width)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(depth))
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    @staticmethod
    def problems(image_size: int, width: int, depth: int) -> list[tuple[str, str]]:
        """List what is wrong with the settings, each with its name."""
        return [("width", f"is {width}; it must be a multiple of 4")] if width % 4 else []

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict for images x_t (N, C, H, W) at t (N,), with labels (N,), -1 for none."""
        context = torch.full_like(t, -1) if context is None else context
        known = (self.time(t) + self.label(context + 1))[:, :, None, None]  # label 0 of the layer is none
        h = self.conv_in(x_t)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = h + conv(F.silu(norm(h) + known))
        return self.conv_out(F.silu(h))

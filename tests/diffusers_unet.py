"""diffusers' U-Net in the shape of one of ours, its settings written out, and random weights that hide no branch."""

import torch
from diffusers import UNet2DModel


def make_unet(config, image_size, in_channels, out_channels) -> UNet2DModel:
    attended = [(image_size >> i) in config.attention_resolutions for i in range(len(config.channel_mult))]
    return UNet2DModel(
        sample_size=image_size, in_channels=in_channels, out_channels=out_channels,
        block_out_channels=[config.channels * mult for mult in config.channel_mult],
        layers_per_block=config.num_res_blocks, norm_num_groups=config.norm_groups, norm_eps=1e-6,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
    )  # fmt: skip


def randomise(net):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in net.named_parameters():
            spread = 0.6 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.2
            p.copy_(torch.randn(p.shape, generator=generator) * spread + ("norm" in name and p.ndim == 1))
    return net.eval().requires_grad_(False)

"""Layers that stay in bfloat16 on CUDA where autocast would take float32, and casts of all weights together."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpm.networks.layers import RowDropout, draw_kept, view_as_images

# Kernels that never hold L x L weights; the first that takes the input is used. torch alone may choose one that does.
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
# Layers whose weights autocast casts.
CAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)


class FastGroupNorm(nn.GroupNorm):
    """Group norm whose result is bfloat16 where x is. The kernel's sums are float32 all the same."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_bf16_on_cuda(x):
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast("cuda", enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class FastLayerNorm(nn.LayerNorm):
    """Layer norm whose result is bfloat16 where x is."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_bf16_on_cuda(x):
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def is_on_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda"


def is_bf16_on_cuda(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and is_on_cuda(x)


def attend_on_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(C)) v, each (N, L, C), by a kernel of ATTENTION; raise RuntimeError if none can."""
    # None of them takes pixels that lie closer than channels.
    q, k, v = (x.unsqueeze(1) if x.stride(2) == 1 else x.unsqueeze(1).contiguous() for x in (q, k, v))
    with sdpa_kernel(ATTENTION, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)


def upsample(x: Tensor) -> Tensor:
    """Repeat every pixel twice each way. Autocast would do so in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ByteDropout(RowDropout):
    """Dropout whose masks have a byte for each number, and are drawn for all layers together.

    size: numbers of an image, as the last pass had them; 0 before. kept: what `draw_masks` drew for the next pass.
    """

    size = 0
    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keys is None:
            return super().forward(x)
        kept, self.kept, self.size = self.kept, None, x[0].numel()
        if kept is None or kept.shape != (len(x), self.size):
            kept = draw_kept(self.keys, self.size, self.dropped)
        return _Drop.apply(x, view_as_images(kept, x), 2**16 / (2**16 - self.dropped))


class FastRowDropout(ByteDropout):
    def forward(self, x: Tensor) -> Tensor:
        is_faster = is_on_cuda(x) and not torch.compiler.is_compiling()
        return super().forward(x) if is_faster else RowDropout.forward(self, x)


class _Drop(torch.autograd.Function):
    """Computes x * kept * scale in one kernel, forward and backward; keeps only the mask in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return torch.ops.aten.native_dropout_backward(x, kept, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.aten.native_dropout_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None


def draw_masks(layers: Iterable[RowDropout]) -> None:
    """Draw the masks of the next pass from the layers' keys, together for all layers with images of one size."""
    alike = defaultdict(list)
    for layer in layers:
        if isinstance(layer, ByteDropout) and layer.size:
            alike[layer.size, layer.dropped].append(layer)
    for (size, dropped), group in alike.items():
        keys = torch.stack([layer.keys for layer in group if layer.keys is not None], dim=1)
        for layer, kept in zip(group, draw_kept(keys, size, dropped), strict=True):
            layer.kept = kept


class _CastAll(torch.autograd.Function):
    """Cast all weights to bfloat16, and all gradients back, by one copy each."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)  # what is not used has no gradient
        return _copy_all(weights, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _copy_all(gradients, torch.float32)


def _copy_all(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    copies = [None if tensor is None else torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_([copy for copy in copies if copy is not None], [x for x in tensors if x is not None])
    return tuple(copies)


def call_with_cast_weights(net: nn.Module, *args: Tensor | None) -> Tensor:
    """Call net(*args) with its weights in bfloat16, all cast by one copy; their gradients are float32."""
    weights = {
        f"{path}.{name}" if path else name: weight
        for path, layer in net.named_modules() if isinstance(layer, CAST)
        for name, weight in layer.named_parameters(recurse=False)
    }  # fmt: skip
    cast = dict(zip(weights, _CastAll.apply(*weights.values()), strict=True))
    return torch.func.functional_call(net, cast, args)


def keep_cast_weights(net: nn.Module) -> None:
    """Cast the weights of a network to bfloat16, once; it cannot be trained afterwards."""
    for layer in net.modules():
        if isinstance(layer, CAST):
            for weight in layer.parameters(recurse=False):
                weight.data = weight.data.bfloat16()

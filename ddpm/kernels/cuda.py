"""Layers in bfloat16 on CUDA: what autocast would compute in float32, and casts that it would make one by one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Those that never hold L x L weights, the first that takes the input; torch alone may fall back on one that does.
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
# Layers whose weights autocast casts.
CAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)


class FastGroupNorm(nn.GroupNorm):
    """Group norm whose result is bfloat16 where x is. The kernel's sums are float32 all the same."""

    def forward(self, x: Tensor) -> Tensor:
        if is_bf16_on_cuda(x):
            return _normalize(F.group_norm, self.num_groups, self, x)
        return super().forward(x)


class FastLayerNorm(nn.LayerNorm):
    """Layer norm, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        if is_bf16_on_cuda(x):
            return _normalize(F.layer_norm, self.normalized_shape, self, x)
        return super().forward(x)


def _normalize(
    function: Callable[..., Tensor], over: int | tuple[int, ...], norm: nn.GroupNorm | nn.LayerNorm, x: Tensor
) -> Tensor:
    """Normalise over groups or a shape, in the type of x."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    with torch.autocast("cuda", enabled=False):
        return function(x, over, weight, bias, norm.eps)


def is_on_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda"


def is_bf16_on_cuda(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and is_on_cuda(x)


def attend_on_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(C)) v, each (N, L, C), by one of ATTENTION. Raises RuntimeError where none can."""
    # None of them takes pixels that lie closer than channels.
    q, k, v = (x[:, None].contiguous() for x in (q, k, v))
    with sdpa_kernel(ATTENTION, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class _CastAll(torch.autograd.Function):
    """Cast all weights to bfloat16, and all gradients back, by one copy each."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *weights: Tensor) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)  # what is not used has no gradient
        return _copy_all(weights, torch.bfloat16)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return _copy_all(gradients, torch.float32)


def _copy_all(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    copies = [None if tensor is None else torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_([copy for copy in copies if copy is not None], [x for x in tensors if x is not None])
    return tuple(copies)


def call_with_cast_weights(net: nn.Module, *args: Tensor | None) -> Tensor:
    """Call net(*args) with weights in bfloat16, as autocast does, but cast together; they get float32 gradients."""
    weights = {
        f"{path}.{name}" if path else name: weight
        for path, layer in net.named_modules() if isinstance(layer, CAST)
        for name, weight in layer.named_parameters(recurse=False)
    }  # fmt: skip
    cast = dict(zip(weights, _CastAll.apply(*weights.values()), strict=True))
    return torch.func.functional_call(net, cast, args)


def keep_cast_weights(net: nn.Module) -> None:
    """Cast the weights of a network that is not trained to bfloat16, once."""
    for layer in net.modules():
        if isinstance(layer, CAST):
            for weight in layer.parameters(recurse=False):
                weight.data = weight.data.bfloat16()

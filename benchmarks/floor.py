"""The floor: the convolutions and matrix products of one call, alone, on tensors of their shapes and layouts."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    aten.convolution.default, aten.convolution_backward.default, aten.addmm.default, aten.mm.default,
    aten.bmm.default, aten.baddbmm.default,
}  # fmt: skip


class _Recorder(TorchDispatchMode):
    """Counts the products by operator, shapes, strides, types and other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in PRODUCTS:
            self.seen[func, tuple(_signature(a) for a in args), tuple((kwargs or {}).items())] += 1
        return func(*args, **(kwargs or {}))


def floor_of(call: Callable[[], Any]) -> Callable[[], None]:
    """A function that repeats the products that `call` makes, and nothing else. `call` must not be compiled."""
    recorder = _Recorder()
    with recorder:
        call()
    products = [
        (func, [_made(a) for a in args], dict(kwargs), count)
        for (func, args, kwargs), count in recorder.seen.items()
    ]

    @torch.no_grad()
    def repeat() -> None:
        for func, args, kwargs, count in products:
            for _ in range(count):
                func(*args, **kwargs)

    return repeat


def _signature(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ("tensor", tuple(argument.shape), argument.stride(), argument.dtype, argument.device)
    return tuple(argument) if isinstance(argument, list) else argument


def _made(signature: Any) -> Any:
    if isinstance(signature, tuple) and signature[:1] == ("tensor",):
        _, shape, stride, dtype, device = signature
        numbers = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))  # expanded: stride 0
        return torch.randn(numbers, dtype=dtype, device=device).as_strided(shape, stride)
    return list(signature) if isinstance(signature, tuple) else signature

"""CUDA graphs: what a GPU does in a call is recorded once, and started again by one launch.

They help where the CPU launches kernels more slowly than the GPU runs them. The kernels are the same, so are the
numbers. A recorded call must not wait for the device, and its shapes must not change.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import rng
from ddpm.config import Precision, TrainConfig
from ddpm.diffusion import Diffusion
from ddpm.kernels.cuda import keep_cast_weights
from ddpm.precision import PreciseNetwork
from ddpm.rng import Stream
from ddpm.training import TrainState, compute_gradients

TRIED = 3  # calls before the recording, in which kernels are chosen and compiled
RECORDED = 2  # kinds of inputs of a network that are recorded: whole batches, and the last one


class RecordedCall:
    """A function of tensors on a GPU. It runs TRIED times as it is, then it is recorded, and repeated from then on.

    stream: of the recording. Results are the same tensors at every call, which the next one overwrites. All that is not
    an input stays as it was when the call was recorded.
    """

    def __init__(self, function: Callable[..., Any], stream: torch.cuda.Stream) -> None:
        self.function, self.stream, self.calls = function, stream, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor | None) -> Any:
        self.calls += 1
        if self.calls <= TRIED:
            return self._try(*inputs)
        if self.graph is None:
            self.graph = self._record(*inputs)
        else:
            copy_inputs(self.inputs, inputs)
        self.graph.replay()
        return self.results

    def _try(self, *inputs: Tensor | None) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _record(self, *inputs: Tensor | None) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.inputs = [None if given is None else given.clone() for given in inputs]
        with torch.cuda.graph(graph, stream=self.stream):
            self.results = self.function(*self.inputs)
        return graph


def describe_inputs(inputs: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return what may not change between calls of a recording."""
    return tuple(None if given is None else (given.shape, given.dtype, given.device) for given in inputs)


def copy_inputs(own: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
    """Copy the inputs of a call into those of the recording; raise ValueError if they are of another kind."""
    if describe_inputs(own) != describe_inputs(given):
        raise ValueError(f"recorded with {describe_inputs(own)}, called with {describe_inputs(given)}")
    for into, value in zip(own, given, strict=True):
        if into is not None and value is not None:
            into.copy_(value)


class RecordedNetwork(nn.Module):
    """A network that is not trained, recorded for the first RECORDED kinds of its inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.stream, self.calls = net, torch.cuda.Stream(), dict[tuple[Any, ...], RecordedCall]()

    def forward(self, *inputs: Tensor | None) -> Tensor:
        kind = describe_inputs(inputs)
        if kind not in self.calls and len(self.calls) < RECORDED:
            self.calls[kind] = RecordedCall(self.net, self.stream)
        result: Tensor = self.calls[kind](*inputs).clone() if kind in self.calls else self.net(*inputs)
        return result


def prepare_network(
    net: nn.Module, precision: Precision, device: torch.device, graph: bool = False
) -> nn.Module:
    """Return a network on `device`, compiled or not, that is not trained, in its precision.

    graph: recorded, if the device is a GPU. Its weights are cast to bfloat16 where that is enough.
    """
    if precision == "bf16" and device.type == "cuda":
        keep_cast_weights(net)
    precise = PreciseNetwork(net, precision)
    return RecordedNetwork(precise) if graph and device.type == "cuda" else precise


def can_record(state: TrainState, world_size: int) -> bool:
    """Return whether the gradients of a training can be recorded: alone on a GPU, with no host's part in a step."""
    is_alone = next(state.net.parameters()).device.type == "cuda" and world_size == 1
    recomputes = getattr(getattr(state.net, "config", None), "recompute", 0)
    return is_alone and state.t_sampler is None and not recomputes


class RecordedGradients:
    """`compute_gradients` of one training as a graph: all draws, and forward and backward pass of every part.

    Where a network draws from torch's generator, a step has one seed, not one for each part. Raises ValueError where
    `can_record` says no, and if anything but x_0, context and state.step changes.
    """

    def __init__(self) -> None:
        self.recorded: RecordedCall | None = None

    def __call__(
        self, state: TrainState, diffusion: Diffusion, x_0: Tensor, rows: Tensor, *, config: TrainConfig, seed: int,
        context: Tensor | None = None, forward: nn.Module | None = None, world_size: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        fixed = (state, diffusion, rows.tolist(), config, seed, forward)
        if self.recorded is None:
            if not can_record(state, world_size):
                raise ValueError("a graph needs one worker, a GPU, t_sampling=uniform and recompute=0")
            self.fixed, on_device = fixed, rows.to(x_0.device)

            def compute(x_0: Tensor, step: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
                return compute_gradients(
                    state, diffusion, x_0, on_device, config=config, seed=seed, context=context, forward=forward,
                    step=step,
                )  # fmt: skip

            self.recorded = RecordedCall(compute, torch.cuda.Stream())
        if fixed != self.fixed:
            raise ValueError("the graph was recorded for another training")
        torch.manual_seed(rng.draw_torch_seed(seed, Stream.DROPOUT, state.step, int(rows[0])))
        found: tuple[Tensor, Tensor, Tensor] = self.recorded(
            x_0, torch.full((), state.step, device=x_0.device), context
        )
        return found

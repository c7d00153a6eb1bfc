"""CUDA graphs: what a GPU does in a call is recorded once, and started again by one launch.

They help where the CPU launches kernels more slowly than the GPU runs them. The kernels are the same, so are the
numbers. A recorded call must not wait for the device, and its shapes must not change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import rng
from ddpm.config import TrainConfig
from ddpm.diffusion import Diffusion
from ddpm.rng import Stream
from ddpm.training import TrainState, compute_gradients

TRIED = 3  # calls before the recording, in which kernels are chosen and compiled


class RecordedCall:
    """A function of tensors on a GPU, recorded after TRIED calls; these run as without it, on the recording's stream.

    Results are the same tensors at every call, which the next one overwrites. Other values are those of the recording.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls, self.stream = function, 0, torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor | None) -> Any:
        self.calls += 1
        if self.calls <= TRIED:
            return self._try(*inputs)
        if self.graph is None:
            self.inputs = [None if given is None else given.clone() for given in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.results = self.function(*self.inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self.graph.replay()
        return self.results

    def _try(self, *inputs: Tensor | None) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results


class RecordedNetwork(nn.Module):
    """A network that is not trained, recorded for each shape of its inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, dict[tuple[torch.Size, ...], RecordedCall]()

    def forward(self, *inputs: Tensor | None) -> Tensor:
        shapes = tuple(given.shape for given in inputs if given is not None)
        if shapes not in self.calls:
            self.calls[shapes] = RecordedCall(self.net)
        result: Tensor = self.calls[shapes](*inputs).clone()
        return result


class RecordedGradients:
    """`compute_gradients` of one training as a graph: all draws, and forward and backward pass of every part.

    Where a network draws from torch's generator, a step has one seed, not one for each part.
    """

    recorded: RecordedCall | None = None

    def __call__(
        self, state: TrainState, diffusion: Diffusion, x_0: Tensor, rows: Tensor, *, config: TrainConfig, seed: int,
        context: Tensor | None = None, forward: nn.Module | None = None, world_size: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if self.recorded is None:
            on_device = rows.to(x_0.device)

            def compute(x_0: Tensor, step: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
                return compute_gradients(
                    state, diffusion, x_0, on_device, config=config, seed=seed, context=context, forward=forward,
                    world_size=world_size, step=step,
                )  # fmt: skip

            self.recorded = RecordedCall(compute)
        torch.manual_seed(rng.draw_torch_seed(seed, Stream.DROPOUT, state.step, int(rows[0])))
        found: tuple[Tensor, Tensor, Tensor] = self.recorded(
            x_0, torch.full((), state.step, device=x_0.device), context
        )
        return found

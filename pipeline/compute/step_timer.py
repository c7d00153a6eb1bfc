"""Measures each worker's own part of a training step, so that a slow machine is found."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from pipeline.compute.units import Worker


class StepTimer:
    """Measures the part of a step in which a worker does not wait for others: its images, its loss and its gradients.

    A whole step takes equally long on all ranks, since each waits for the slowest before it changes the weights.
    """

    def __init__(self, ctx: Worker, net: nn.Module):
        self.ctx = ctx
        self.spans: list[list[Any]] = []  # begin and end of each step since the last point of the log
        if ctx.world_size > 1:  # the gradient of the first parameter is among the last
            first = next(p for p in net.parameters() if p.requires_grad)
            first.register_post_accumulate_grad_hook(self._end)

    def begin(self) -> None:
        if self.ctx.world_size > 1:  # alone, nothing is compared
            self.spans.append([self._read_clock()])

    def _end(self, _: torch.Tensor) -> None:
        self.spans[-1][1:] = [self._read_clock()]  # of the last part, if train.accumulate makes several

    def _read_clock(self) -> Any:
        if self.ctx.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # the device's queue reaches it later than this process
        event.record()
        return event

    def compare_ranks(self) -> dict[str, float]:
        """Return the smallest and the largest mean over ranks since the last call, and the slowest rank; {} if alone.

        The device must have finished these steps.
        """
        spans, self.spans = self.spans, []
        if self.ctx.world_size == 1:
            return {}
        is_cpu = self.ctx.device.type == "cpu"
        seconds = [end - begin if is_cpu else begin.elapsed_time(end) / 1000 for begin, end in spans]
        means = torch.zeros(self.ctx.world_size, dtype=torch.float64, device=self.ctx.device)
        means[self.ctx.rank] = sum(seconds) / len(seconds)
        ranks = self.ctx.sum_over_workers(means).tolist()
        return {
            "train/step_seconds_min": min(ranks),
            "train/step_seconds_max": max(ranks),
            "train/slowest_rank": ranks.index(max(ranks)),
        }

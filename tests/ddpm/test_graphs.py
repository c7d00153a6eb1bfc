"""What a recording refuses, which needs no GPU; tests/gpu holds what it computes."""

import pytest
import torch

from ddpm import Diffusion, TrainConfig, TrainState, UNetConfig, build_network
from ddpm.graphs import RecordedGradients, copy_inputs

X, LABELS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "given", [(X, None), (X[:1], LABELS), (X.double(), LABELS), (X.to("meta"), LABELS), (None, LABELS)]
)
def test_inputs_are_copied_and_those_of_another_kind_refused(given):
    copy_inputs(own := [X.clone(), None], (X + 1, None))
    assert torch.equal(own[0], X + 1)
    with pytest.raises(ValueError, match="recorded with"):
        copy_inputs([X.clone(), LABELS.clone()], given)


def test_a_training_without_a_gpu_is_refused():
    config = UNetConfig(
        channels=4, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), norm_groups=2
    )
    state = TrainState(TrainConfig(), build_network(config, 4, 1, 1, seed=0), Diffusion().config)
    x_0, rows = torch.zeros(2, 1, 4, 4), torch.arange(2)
    with pytest.raises(ValueError, match="one worker, a GPU"):
        RecordedGradients()(state, Diffusion(), x_0, rows, config=TrainConfig(batch_size=2), seed=0)

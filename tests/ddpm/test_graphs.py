"""What a recording refuses, which needs no GPU; tests/gpu holds what it computes."""

import pytest
import torch

from ddpm.graphs import copy_inputs

X, LABELS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "given", [(X, None), (X[:1], LABELS), (X.double(), LABELS), (X.to("meta"), LABELS), (None, LABELS)]
)
def test_inputs_of_another_kind_are_refused(given):
    with pytest.raises(ValueError, match="recorded with"):
        copy_inputs([X.clone(), LABELS.clone()], given)


def test_inputs_are_copied():
    own = [X.clone(), None]
    copy_inputs(own, (X + 1, None))
    assert torch.equal(own[0], X + 1)

import pytest
import torch

from ddpm.images import from_uint8, to_uint8


def test_grey_levels_come_back_values_are_rounded_and_clamped_and_wrong_types_refused():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = from_uint8(levels)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), levels)
    x = (torch.tensor([-9.0, -0.4, 0.4, 0.6, 99.7, 254.6, 300.0]) - 127.5) / 127.5
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 100, 255, 255]
    with pytest.raises(TypeError, match="uint8"):
        from_uint8(torch.zeros(2))
    with pytest.raises(TypeError, match="floating"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))

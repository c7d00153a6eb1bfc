"""Dropout by keys: right shares, independent decisions, each image for itself."""

import math

import pytest
import torch

from ddpm import rng
from ddpm.kernels import cuda
from ddpm.networks.layers import RowDropout, set_dropout_keys
from ddpm.rng import Stream

FORMATS = [torch.channels_last, torch.contiguous_format]


def drop(x: torch.Tensor, rows: torch.Tensor, p: float = 0.1, step: int = 0) -> torch.Tensor:
    layer = RowDropout(p)
    layer.keys = rng.draw_words(0, Stream.DROPOUT, step, rows, 2).T.reshape(2, -1, 1)
    return layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("p", [0.1, 0.4])
def test_dropout_drops_so_many_and_scales_the_rest(memory_format, dtype, p):
    torch.manual_seed(0)
    x = (1 + torch.rand(4, 33, 63, 31)).to(dtype).to(memory_format=memory_format).requires_grad_()
    y = drop(x, torch.arange(4), p)
    kept, count = y != 0, x.numel()
    assert float(kept.sum()) == pytest.approx((1 - p) * count, abs=4 * math.sqrt(p * (1 - p) * count))
    torch.testing.assert_close(y[kept].float(), x[kept].float() / (1 - p), rtol=1e-2, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient != 0, kept)
    # Decisions are independent: of neighbouring channels, of pixels, of images, of steps.
    flat = (~kept).permute(0, 2, 3, 1).flatten().double()
    for lag in (1, 2, 3, 4, 33, 33 * 31, 33 * 31 * 63):
        assert float((flat[:-lag] * flat[lag:]).mean()) == pytest.approx(p * p, abs=5 * p / math.sqrt(count))
    other = (drop(x, torch.arange(4), p, step=1) == 0).permute(0, 2, 3, 1).flatten().double()
    assert float((flat * other).mean()) == pytest.approx(p * p, abs=5 * p / math.sqrt(count))


def test_bits_of_a_word_are_fair():
    """The share of every pattern of two neighbouring decisions at p = 1/2, over many keys with short counters."""
    y = drop(torch.ones(4096, 8, 2, 2), torch.arange(4096), 0.5) != 0
    places = y.permute(0, 2, 3, 1).flatten(1).double()  # (keys, places)
    assert (places.mean(dim=0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(4096)
    centred = 2 * places - 1
    correlation = centred.T @ centred / 4096 - torch.eye(32)
    assert correlation.abs().max() < 5 / math.sqrt(4096)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_mask_of_an_image_depends_on_its_row_alone(memory_format):
    x = torch.ones(6, 5, 3, 3).to(memory_format=memory_format)
    rows = torch.arange(6)
    whole = drop(x, rows, 0.5)
    order = torch.tensor([4, 1, 5])
    assert torch.equal(drop(x[order], rows[order], 0.5), whole[order])
    assert torch.equal(whole, drop(torch.ones(6, 5, 3, 3), rows, 0.5))
    assert len({tuple(mask.flatten().tolist()) for mask in whole}) == 6


def test_without_keys_and_in_evaluation_it_is_torchs():
    x = torch.ones(2, 3, 4, 4)
    layer = RowDropout(0.5)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    assert torch.equal(found, torch.nn.functional.dropout(x, 0.5))
    layer.keys = torch.zeros(2, 2, 1, dtype=torch.int32)
    assert torch.equal(layer.eval()(x), x)


def test_the_masks_of_a_gpu_are_those_of_the_layers():
    """Run on the CPU: masks of a byte, drawn together from the second step on, drop the same numbers both ways."""
    sizes = [(5, 3, 3), (4, 2, 2), (5, 3, 3)]
    layers = [cuda.ByteDropout(0.3) for _ in range(3)]
    for number in range(2):
        keys = rng.draw_words(0, Stream.DROPOUT, number, torch.arange(6), 6).T.reshape(3, 2, 6, 1)
        with set_dropout_keys(layers, keys):
            cuda.draw_masks(layers)
            assert [layer.kept is not None for layer in layers] == [number > 0] * 3
            for layer, its_keys, size in zip(layers, keys, sizes, strict=True):
                x = torch.randn(6, *size).to(memory_format=torch.channels_last).requires_grad_()
                plain = RowDropout(0.3)
                plain.keys = its_keys
                found, expected = layer(x), plain(x)
                assert torch.equal(found, expected)
                gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
                assert torch.equal(*gradients)
                assert layer.kept is None

"""The likelihood on real images, where CIFAR-10 is at hand: figures of the authors' protocol, no training."""

import io
from pathlib import Path

import pytest
import torch

from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from ddpm.linear_denoiser import (
    compute_linear_mse,
    compute_profile,
    convert_mse_to_terms,
)

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
pytestmark = pytest.mark.skipif(not CIFAR10.is_dir(), reason="no copy of CIFAR-10 in ../shared/data/cifar10")


def read(split: str) -> torch.Tensor:
    """uint8 (N, 3, 32, 32)."""
    parquet, image = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("PIL.Image")
    rows = []
    for path in sorted(CIFAR10.glob(f"{split}-*.parquet")):
        for cell in parquet.read_table(path, columns=["img"])["img"]:
            png = image.open(io.BytesIO(cell["bytes"].as_py()))
            rows.append(torch.frombuffer(bytearray(png.tobytes()), dtype=torch.uint8))
    return torch.stack(rows).reshape(-1, 32, 32, 3).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def test_images() -> torch.Tensor:
    return from_uint8(read("test"))


@pytest.fixture(scope="module")
def covariance(test_images) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (3072,), eigenvalues (3072,) and eigenvectors of the test set, float64."""
    x = test_images.flatten(1).double()
    mean = x.mean(dim=0)
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    return mean, values.clamp(min=0), vectors


@pytest.mark.slow  # the eigenvectors of 3,072 dimensions
def test_rates_of_the_best_linear_denoiser(covariance):
    """Its expected MSE in closed form, turned into rates: Table 4's rows for a denoiser known exactly."""
    diffusion, (_, values, _) = Diffusion(), covariance
    mse = compute_linear_mse(values, diffusion.tables["alpha_bar"])
    terms = convert_mse_to_terms(diffusion, mse)
    rates = (4.0483e-05, 1.02489e-03, 7.90632e-03, 3.41312e-02, 1.68577e-01, 2.452784)
    rmses = (62.7020, 54.3384, 39.8764, 27.9870, 15.3258, 1.10353)
    for k, rate, rmse in zip((100, 300, 500, 700, 900, 1000), rates, rmses, strict=True):
        assert terms[1000 - k + 1 :].sum().item() == pytest.approx(rate, rel=2e-5)
        assert 127.5 * mse[1000 - k].sqrt().item() == pytest.approx(rmse, rel=2e-5)
    q = compute_profile(diffusion, values)
    # Golden for the training images, from which the test images differ by a little.
    shares = [q[1].item(), q[:11].sum().item(), q[:101].sum().item()]
    assert shares == pytest.approx([0.180, 0.594, 0.933], abs=3e-3)
    assert float((1 - (1 - q) ** 7).sum()) == pytest.approx(5.97, abs=0.03), "distinct passes of seven draws"


@pytest.mark.slow
def test_rates_of_single_images(test_images, covariance):
    """The linear denoiser's, expected over the noise: the first 64 images are harder than the 10,000."""
    diffusion, (mean, values, vectors) = Diffusion(), covariance
    alpha_bar = diffusion.tables["alpha_bar"][:, None].double()
    gain = alpha_bar.sqrt() * values / (alpha_bar * values + 1 - alpha_bar)  # of x_t, by eigenvector
    squares = ((test_images.flatten(1).double() - mean) @ vectors) ** 2
    of_noise = ((1 - alpha_bar) * gain**2).mean(dim=1, keepdim=True)
    mse = of_noise + (1 - alpha_bar.sqrt() * gain) ** 2 @ squares.T / len(values)
    rates = torch.stack([convert_mse_to_terms(diffusion, of_image).sum() for of_image in mse.T])
    found = [rates.mean(), rates.std(), rates[:64].mean(), rates[:8].mean()]
    assert [value.item() for value in found] == pytest.approx([2.452784, 0.26912, 2.53989, 2.51197], rel=2e-5)

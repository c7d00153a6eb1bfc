"""Bounds and scores at the paper's scale, where CIFAR-10 is at hand: figures known beforehand, no training."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import one_cpu
from coverage_of_errors import measure_coverage
from fidelity import Images, arguments
from staged import run_stage, scoring
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from ddpm.denoisers import compute_linear_mse, compute_profile, convert_mse_to_terms, make_linear_denoiser
from ddpm.diffusion import Diffusion
from ddpm.likelihood import compute_bits_per_dim
from pipeline import config
from pipeline.engine.find import make_place
from pipeline.report.paper import TABLE_4
from pipeline.scores import classifier, extractors
from pipeline.scores import distances as scores
from pipeline.scores.extractors import find_extractor
from pipeline.scores.image_sets import make_shard_set
from pipeline.scores.preparations import list_gaussian_units, list_preparations, load_variances
from pipeline.stages import shard
from pipeline.stages.evaluate import bound
from pipeline.stages.figures import optimum
from pipeline.store import tars
from pipeline.store.arrays import read_arrays

CIFAR10 = Path(__file__).parents[4] / "shared" / "data" / "cifar10"
pytestmark = [
    pytest.mark.skipif(not CIFAR10.is_dir(), reason="no copy of CIFAR-10 in ../shared/data/cifar10"),
    pytest.mark.slow,
]
ROWS = (100, 300, 500, 700, 900, 1000)
# Of the best linear denoiser, in expectation over the 10,000 test images: the rows of its Table 4.
RATES = (4.0483e-05, 1.02489e-03, 7.90632e-03, 3.41312e-02, 1.68577e-01, 2.452784)
RMSES = (62.7020, 54.3384, 39.8764, 27.9870, 15.3258, 1.10353)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """A run with the shards, whose denoisers predict x_0."""
    overrides = [f"data.path={CIFAR10}", "diffusion.predict=x0", "evaluate.features=classifier"]
    overrides += ["evaluate.checkpoints=null", "sample.checkpoint=last"]
    run = make_place(config.load_experiment("cifar10", overrides), tmp_path_factory.mktemp("cifar10"))
    run_stage(shard, run)
    return run


@pytest.fixture(scope="module")
def test_images(cifar10):
    """The test set, float64 (10,000, 3072)."""
    return tars.load_images(cifar10.data, "test")[0].reshape(10_000, -1) / 127.5 - 1


@pytest.fixture(scope="module")
def covariance(test_images):
    """Mean (3072,), eigenvalues (3072,) and eigenvectors of the test set."""
    values, vectors = np.linalg.eigh(np.cov(test_images, rowvar=False, bias=True))
    return test_images.mean(axis=0), values.clip(min=0), vectors


# The bound of the best linear denoiser

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def test_rates_of_the_best_linear_denoiser(covariance):
    """Its expected MSE in closed form, turned into rates: Table 4's rows for a denoiser known exactly."""
    diffusion, values = Diffusion(), torch.from_numpy(covariance[1])
    mse = compute_linear_mse(values, diffusion.tables["alpha_bar"])
    terms = convert_mse_to_terms(diffusion, mse)
    for k, rate, rmse in zip(ROWS, RATES, RMSES, strict=True):
        assert terms[1000 - k + 1 :].sum().item() == pytest.approx(rate, rel=2e-5)
        assert 127.5 * mse[1000 - k].sqrt().item() == pytest.approx(rmse, rel=2e-5)
    q = compute_profile(diffusion, values)
    # Golden for the training images, from which the test images differ by a little.
    shares = [q[1].item(), q[:11].sum().item(), q[:101].sum().item()]
    assert shares == pytest.approx([0.180, 0.594, 0.933], abs=3e-3)
    assert float((1 - (1 - q) ** 7).sum()) == pytest.approx(5.97, abs=0.03), "distinct passes of seven draws"


def test_rates_of_single_images(test_images, covariance):
    """The linear denoiser's, expected over the noise: the first 64 images are harder than the 10,000."""
    diffusion, (mean, values, vectors) = Diffusion(), covariance
    signal = ALPHA_BAR[:, None]
    gain = np.sqrt(signal) * values / (signal * values + 1 - signal)  # of x_t, by eigenvector
    squares = ((test_images - mean) @ vectors) ** 2
    of_noise = ((1 - signal) * gain**2).mean(axis=1, keepdims=True)
    mse = torch.from_numpy(of_noise + (1 - np.sqrt(signal) * gain) ** 2 @ squares.T / len(values))
    rates = torch.stack([convert_mse_to_terms(diffusion, of_image).sum() for of_image in mse.T])
    found = [rates.mean(), rates.std(), rates[:64].mean(), rates[:8].mean()]
    assert [value.item() for value in found] == pytest.approx([2.452784, 0.26912, 2.53989, 2.51197], rel=2e-5)


def test_the_rates_of_the_line_come_out_of_the_units(cifar10, test_images, covariance, monkeypatch):
    """The whole bound of 16 images through units and merge, with the best linear denoiser in the network's place.
    These images' own expectation is known in closed form, and so is that of all: their ratio turns the rates of the
    few into those of the table, within the 1 % that one draw of noise for 16 images leaves."""
    cifar10 = scoring(cifar10, nll_images=16, nll_batch_size=8)
    mean, values, vectors = covariance
    tensors = (torch.from_numpy(array).float() for array in (mean, vectors, values))
    net = make_linear_denoiser(Diffusion(cifar10.experiment.diffusion), *tensors)
    monkeypatch.setattr(bound.checkpoint, "load_model", lambda *_: SimpleNamespace(net=net))
    monkeypatch.setattr(bound, "compute_bits_per_dim", partial(compute_bits_per_dim, clip=False))
    units = bound.plan_units(cifar10)
    one_cpu().run_units(list(units.values()), lambda unit: None)
    rows = bound.average_bound(units, 1000)[1]["rate_distortion"]
    spread = (((test_images[:16] - mean) @ vectors) ** 2).mean(axis=0)
    signal = ALPHA_BAR[:, None]
    shrink = signal * values / (signal * values + 1 - signal)
    few = ((1 - shrink) ** 2 * spread + shrink**2 * (1 - signal) / signal).mean(axis=1)
    everyone = (values * (1 - signal) / (signal * values + 1 - signal)).mean(axis=1)
    for k, rate in zip(ROWS, RATES, strict=True):
        terms = (convert_mse_to_terms(Diffusion(), torch.from_numpy(mse)) for mse in (few, everyone))
        of_few, of_all = (its[1000 - k + 1 :].sum().item() for its in terms)
        assert of_all == pytest.approx(rate, rel=2e-5)
        sent = rows[k - 1]["rate_bpd"] - rows[0]["rate_bpd"]  # without the prior
        print(f"k = {k}: rate {sent * of_all / of_few:.6g}, expected {rate:.6g}")
        assert sent * of_all / of_few == pytest.approx(rate, rel=1e-2)


def test_95_of_100_intervals_of_the_whole_test_set_hold_its_rate(test_images, tmp_path):
    """70,000 draws for each of 100 seeds; another program counted 97, a spread of 0.00071 and errors of 0.00077."""
    held, spread, error = measure_coverage(torch.from_numpy(test_images), tmp_path)
    print(f"{held} of 100 intervals, spread {spread:.5f}, mean standard error {error:.5f}")
    assert 89 <= held <= 99 and error == pytest.approx(0.00077, abs=5e-5)


def test_two_rows_of_table_4_follow_from_first_principles(cifar10, monkeypatch, tmp_path):
    """The posterior mean over all training images, on 128 test images, levelled by the line to all of them.

    The line of the training covariance over the training images has the rate 2.53039.
    """
    run, diffusion, excess = cifar10, Diffusion(), []
    monkeypatch.setattr(optimum, "list_levels", lambda *_: [900, 800, 700])
    one_cpu().run_units(list_gaussian_units(run), lambda unit: None)
    variances, source = load_variances(run)
    line = compute_linear_mse(variances, diffusion.tables["alpha_bar"])
    assert convert_mse_to_terms(diffusion, line).sum().item() == pytest.approx(2.53039, abs=1e-5)
    assert source == "the covariance of all 50,000 training images"
    for split in ("test", "train"):
        optimum.write_errors(one_cpu().context, run, split, True, 0, 128, tmp_path / "errors.npz")
        excess.append(optimum.compare_errors(*read_arrays(tmp_path / "errors.npz")["errors"][:2])[0])
    exact = 127.5 * np.sqrt(line[[900, 800, 700]].numpy()) * (1 + excess[0])
    print(f"k = 100, 200, 300: {exact}; over the line {excess[0]}, in sample {excess[1]}")
    assert exact == pytest.approx([62.702, 60.17, 54.15], rel=0.005)
    assert exact[1:] == pytest.approx([TABLE_4[k][1] for k in (200, 300)], rel=0.02)
    assert (excess[1] < excess[0] + 2e-3).all()
    assert excess[1] == pytest.approx([-1e-4, -9e-4, -0.008], abs=0.006)


def test_fid_of_all_test_against_all_training_images_is_torch_fidelitys(cifar10):
    """Through the units, tar by tar, by the features of the classifier that the pipeline trains.

    The two splits are nearly equal in these features, so their FID is a small difference of large numbers and
    torch-fidelity's float32 mean shows in its fifth digit. Hence its own functions on the merged feature files:
    in float32 they give its call's result, in float64 ours.
    """
    wanted = [unit for unit in list_preparations(cifar10) if "classifier" in unit.name]
    one_cpu().run_units(wanted, lambda unit: None)
    extractor = find_extractor(cifar10)
    features, found = {}, {}
    for split in ("test", "train"):
        images = make_shard_set(
            extractor, tars.open_shards(cifar10.data).list_shards(split), (3, 32, 32),
            cifar10.reference_features,
        )  # fmt: skip
        one_cpu().run_units(images.list_missing(), lambda unit: None)
        features[split], found[split] = images.read_features(), images.sum_features().moments.to_statistics()
    assert (found["test"].n, found["train"].n) == (10_000, 50_000)
    ours = scores.compute_fid(found["test"], found["train"])
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(torch.from_numpy(tars.load_images(cifar10.data, "test")[0])),
        input2=Images(torch.from_numpy(tars.load_images(cifar10.data, "train")[0])),
        **arguments(extractor, "fid"), fid=True, cuda=False, cache=False, save_cpu_ram=True, verbose=False,
        batch_size=extractors.BATCH,
    )["frechet_inception_distance"]  # fmt: skip
    print(f"FID of test against train: {ours!r}, torch-fidelity's {theirs!r}, {ours / theirs - 1:.1e}")
    assert theirs == pytest.approx(merged_fid(features, torch.float32), rel=1e-6)
    assert ours == pytest.approx(merged_fid(features, torch.float64), rel=1e-6)
    assert ours == pytest.approx(theirs, rel=1e-4)
    net = classifier.load_classifier(extractor.weights)
    assert classifier.measure_accuracy(net, *tars.load_images(cifar10.data, "test")) > 0.4


def merged_fid(features, dtype):
    """By torch-fidelity's own functions."""
    parts = (torch.from_numpy(features[split]).to(dtype) for split in ("test", "train"))
    statistics = (fid_features_to_statistics(part) for part in parts)
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

"""How far a network is from the best denoiser, by noise level."""

import numpy as np
import pytest
import torch
from conftest import one_cpu, tiny_experiment
from staged import change, run_stage, with_weights

from ddpm.diffusion import Diffusion
from ddpm.linear_denoiser import compute_linear_mse
from ddpm.rng import Stream, draw_normal
from pipeline.engine.find import make_place
from pipeline.scores.preparations import list_gaussian_units, load_linear_denoiser, load_variances
from pipeline.stages import figures
from pipeline.stages.figures import optimum
from pipeline.store import tars
from pipeline.store.files import FiguresManifest, read_arrays, read_manifest


def test_the_linear_denoiser_is_the_matrix_formula(tiny_run):
    """By an inverse instead of eigenvectors, with the singular covariance of the digits, whose corners are constant."""
    run = tiny_run
    one_cpu().run_units(list_gaussian_units(run), lambda unit: None)
    train = tars.load_images(run.data, "train")[0].reshape(-1, 64) / 127.5 - 1
    mean, covariance = train.mean(axis=0), np.cov(train, rowvar=False, bias=True)
    assert np.linalg.matrix_rank(covariance) < 64
    diffusion = Diffusion(run.experiment.diffusion)
    net, _ = load_linear_denoiser(run, diffusion, torch.device("cpu"))
    mse = compute_linear_mse(load_variances(run)[0], diffusion.tables["alpha_bar"])
    x_t = draw_normal(0, Stream.FIGURES, 0, torch.arange(5), (1, 8, 8))
    for t in (0, 10, 19):
        signal = diffusion.tables["alpha_bar"][t].item()
        noisy = signal * covariance + (1 - signal) * np.eye(64)
        gain = signal**0.5 * covariance @ np.linalg.inv(noisy)
        expected = mean + (x_t.flatten(1).numpy() - signal**0.5 * mean) @ gain.T
        assert net(x_t, torch.full((5,), t)).flatten(1).numpy() == pytest.approx(expected, abs=1e-5)
        posterior = covariance - signal**0.5 * gain @ covariance
        assert mse[t].item() == pytest.approx(np.trace(posterior) / 64, rel=1e-8)


def test_the_figure_says_where_the_network_loses_most_and_shares_what_needs_no_training(sharded_storage):
    words = ("name=noisy", "diffusion.beta_end=0.7", "figures.which=[optimum]")
    run = make_place(tiny_experiment(*words), sharded_storage)
    run.path.mkdir(parents=True, exist_ok=True)
    with_weights(run)
    assert [name for name in run_stage(figures, run) if "Gaussian" not in name][:3] == [
        "the posterior mean of test images 0-255", "the posterior mean of train images 0-255",
        "errors of test images 0-63",
    ]  # fmt: skip
    manifest = read_manifest(run.figures, FiguresManifest)
    assert manifest["order"] == ["optimum.svg"]
    finding = manifest["findings"]["optimum.svg"]
    assert "The network loses most at k = " in finding and "worse than predicting the mean image" in finding
    files = [next((run.optimum / split).glob("*.npz")) for split in ("test", "train")]
    (above, _), (below, _) = (optimum.compare_errors(*read_arrays(file)["errors"][:2]) for file in files)
    assert (below < above + 1e-3).all() and below[-1] < above[-1] < 0
    assert np.abs([above[0], below[0]]).max() < 0.001, "of noise alone both make the mean image"
    assert "deterministic" not in finding
    run_stage(figures, chain := change(run, "sample", sampler="ddim", eta=0.0, steps=5))
    finding = read_manifest(chain.figures, FiguresManifest)["findings"]["optimum.svg"]
    assert "**The sampler is deterministic and the network unfinished**" in finding
    raw = change(run, "sample", weights="raw")
    assert len(run_stage(figures, raw)) == 2, "other weights have other errors, beside the same optimum"
    own = ({"betas": (beta,) * run.experiment.diffusion.timesteps} for beta in (0.1, 0.2))
    others = [change(run, "diffusion", **schedule) for schedule in ({"beta_schedule": "cosine"}, *own)]
    assert len({run.optimum, *(other.optimum for other in others)}) == 4, "each schedule has its own"


def test_rows_sentence_and_errors_of_the_distance():
    levels = optimum.list_levels(Diffusion())
    assert (levels[:2], levels[-1], len(levels)) == ([950, 900], 0, 20)
    assert optimum.list_levels(Diffusion(), optimum.NOISY)[-1] == 500
    k, line = [100, 200, 300, 1000], np.array([63.55, 61.28, 55.95, 1.17])
    found = optimum.describe_distance(k, np.array([124.34, 100.09, 68.10, 1.062]), line, 64.08)
    assert "most at k = 100 reverse steps: RMSE 124.34" in found and "63.55 (+95.7%)" in found
    assert "worse than predicting the mean image** (64.08) up to k = 300" in found
    assert "mean image" not in optimum.describe_distance(k, 0.99 * line, line, 64.08)
    line = np.array([[1.0, 3.0, 2.0, 6.0]])
    excess, error = optimum.compare_errors(1.21 * line, line)
    assert excess[0] == pytest.approx(0.1) and error[0] == pytest.approx(0, abs=1e-12)

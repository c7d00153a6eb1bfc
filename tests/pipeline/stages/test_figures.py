"""Figures: the right pictures in the right order, each held by the chain it shows; made once, in units."""

import logging
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from conftest import one_cpu, tiny_experiment
from PIL import Image
from staged import asking_for, change, run_stage, with_weights

from ddpm.denoisers import compute_linear_mse
from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8, to_uint8
from ddpm.networks import NO_LABEL
from ddpm.networks.context_unet import ContextUNet
from ddpm.rng import Stream, draw_normal
from ddpm.sampler import run_chain, run_image_chains
from pipeline import config
from pipeline.engine.find import make_place
from pipeline.scores.preparations import list_gaussian_units, load_linear_denoiser, load_variances
from pipeline.scores.reference import load_reference
from pipeline.stages import evaluate, figures, sample
from pipeline.stages.figures import FIGURES, chains, curves, nearest, optimum
from pipeline.store import tars
from pipeline.store.arrays import read_arrays
from pipeline.store.checkpoint import load_model
from pipeline.store.files import FiguresManifest, read_json, read_manifest
from pipeline.store.run import Place

CURVES = ("rate_distortion", "scores_along", "optimum")
PICTURES = [name + (".svg" if name in CURVES else ".png") for name in FIGURES]
EVERY = f"figures.which=[{','.join(FIGURES)}]"
SCORED = ("evaluate.metrics=[fid,nll]", "evaluate.features=projection", "figures.images=4", EVERY)


def ready(experiment, storage, **sampling) -> Place:
    run = asking_for(make_place(experiment, storage), **sampling)
    run.path.mkdir(parents=True, exist_ok=True)
    with_weights(run)
    run_stage(sample, run)
    return run


@pytest.fixture(scope="module")
def drawn(sharded_storage):
    run = ready(tiny_experiment("name=figures", *SCORED), sharded_storage)
    run_stage(evaluate, run)
    run_stage(figures, run)
    return run


def cells(picture, size=8):
    """(rows, columns, size, size) grey levels of a picture of images that were enlarged to 64 pixels."""
    with Image.open(picture) as image:
        pixels = np.asarray(image)[..., 0]
    rows, columns = pixels.shape[0] // 66, pixels.shape[1] // 66
    tiles = pixels.reshape(rows, 66, columns, 66).transpose(0, 2, 1, 3)[:, :, 1:65, 1:65]
    return tiles[:, :, :: 64 // size, :: 64 // size]


def nearly_equal(a, b):
    """uint8 images, up to a level's rounding in a thousandth of the pixels."""
    return (np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)) <= 1).mean() > 0.999


def samples_of(run, n):
    return tars.load_images(run.samples, "samples", 0, n)[0]


def test_every_figure_is_drawn_in_the_papers_words(drawn):
    manifest = read_manifest(folder := drawn.figures, dict, check="sha256")
    assert manifest["order"] == PICTURES and manifest["skipped"] == {}
    own = [name for name in PICTURES if "(paper, Fig" not in manifest["captions"][name]]
    assert own == ["steps.png", "optimum.svg"]
    assert figures.STAGE.is_done(drawn)
    assert run_stage(figures, drawn) == [], "units are kept"
    by_pixels, by_features = (cells(folder / f"nearest_{space}.png") for space in ("pixels", "features"))
    for shown in (by_pixels, by_features):
        assert shown.shape[:2] == (4, 1 + nearest.NEIGHBOURS)
        assert np.array_equal(shown[:, 0], samples_of(drawn, 4)[:, 0])
    assert not np.array_equal(by_pixels, by_features)


def test_samples_stand_in_a_square_and_progressive_ends_in_them(drawn):
    shown = cells(drawn.figures / "samples.png")
    assert shown.shape[:2] == (4, 3)
    assert np.array_equal(shown.reshape(12, 8, 8), samples_of(drawn, 12)[:, 0])
    shown = cells(drawn.figures / "progressive.png")
    assert shown.shape[:2] == (4, 10)
    assert nearly_equal(shown[:, -1], samples_of(drawn, 4)[:, 0])
    assert not nearly_equal(shown[:, 0], shown[:, -1])
    for steps in (1, 3, 13, 1000):
        kept = chains.list_snapshots(steps)
        assert kept[0] > 0 and kept[-1] == steps and len(kept) == min(10, steps)
        assert {*np.diff([0, *kept])} <= {steps // 10, -(-steps // 10)}


def test_steps_compares_chains_without_and_with_fresh_noise(drawn):
    shown = cells(drawn.figures / "steps.png")
    assert shown.shape[:2] == (8, 4), "10 and 20 steps of T = 20, twice, by two samplers"
    net, diffusion = load_model(drawn, torch.device("cpu")).net, Diffusion(drawn.experiment.diffusion)
    same = {"index": torch.arange(4), "shape": drawn.experiment.data.shape, "seed": drawn.experiment.seed}
    solver = {"sampler": "dpm++", "steps": 10, "eta": 1.0}
    plain = {"variance": "fixedsmall", "steps": 10}
    for row, column, how in ((0, 1, {"sampler": "ddim"}), (0, 2, plain), (1, 2, solver)):
        *_, last = run_image_chains(diffusion, net, **same, **how)
        assert nearly_equal(shown[row::2, column], to_uint8(last.x_t.clamp(-1, 1))[:, 0])


def plain_end(run, x_t, stream, index, steps):
    """So many steps back with the noise of a stream: no mixing anywhere."""
    net = load_model(run, torch.device("cpu")).net

    def noise(t):
        return draw_normal(run.experiment.seed, stream, t, index, x_t.shape[1:])

    diffusion = Diffusion(run.experiment.diffusion)
    *_, last = run_chain(diffusion, net, x_t, noise, variance="fixedsmall", timesteps=range(steps))
    return to_uint8(last.x_t)


def test_interpolation_at_lambda_0_and_1_is_the_plain_chains_and_without_a_step_mixes_pixels(drawn):
    shown = cells(drawn.figures / "interpolation.png")
    assert shown.shape[:2] == (4, 13)
    test_images = torch.from_numpy(tars.load_images(drawn.data, "test", 0, 8)[0])
    index, diffusion = torch.arange(4), Diffusion(drawn.experiment.diffusion)
    eps = draw_normal(drawn.experiment.seed, Stream.FIGURES, len(diffusion), index, (1, 8, 8))
    for images, its, mixed in ((test_images[::2], 0, 1), (test_images[1::2], 12, 11)):
        assert np.array_equal(shown[:, its], images[:, 0])
        x_t = diffusion.q_sample(from_uint8(images), torch.full((4,), 9), eps)
        assert nearly_equal(shown[:, mixed], plain_end(drawn, x_t, Stream.FIGURES, index, 10)[:, 0])
    assert not any(nearly_equal(row[1], row[11]) for row in shown)
    # Coarse to fine goes from all steps to the pixels.
    first, shown = shown[0], cells(drawn.figures / "coarse_to_fine.png")
    assert shown.shape[:2] == (9, 13) and np.array_equal(shown[4], first), "the row of t = T/2"
    a, b = from_uint8(test_images[:2])[:, 0]
    for column in range(11):
        blend = to_uint8((1 - column / 10) * a + column / 10 * b)
        assert nearly_equal(shown[8, 1 + column], blend), "no step at all mixes pixels"
    distance = np.abs(shown[:, 1].astype(int) - shown[:, 0]).mean(axis=(1, 2))
    assert distance[0] > distance[6] > distance[8] == 0, "the fewer steps, the more of the source is left"


def test_a_shared_latent_lies_on_the_samples_chain(drawn):
    for steps in (20, 10, 5):
        x_t, children = chains.draw_from_latents(one_cpu().context, drawn, 3, steps)
        last = plain_end(drawn, x_t, Stream.REVERSE, torch.arange(3), steps)
        assert nearly_equal(last, samples_of(drawn, 3)) and children.shape == (9, 1, 8, 8)
    shown = cells(drawn.figures / "shared_latents.png").astype(float)
    assert shown.shape[:2] == (4, 16)
    spread = [shown[:, at + 1 : at + 4].std(axis=1).mean() for at in (0, 4, 8, 12)]
    assert spread[0] > spread[2] > spread[3] > 0, "later latents leave less to differ"


def test_scores_along_end_in_the_runs_own(drawn):
    figure = curves.plan_scores_along_chain(drawn)
    assert "12 images, too few" in figure.caption
    reference = load_reference(drawn, curves.find_extractor_of_scores(drawn), "train")
    along = curves.score_snapshots(list(figure.units), 12, reference)
    scored = read_json(drawn.metrics_json, dict)["scores"]["fid"]
    assert len(along) == 10 and along[-1]["fid"] == pytest.approx(scored, rel=1e-3)
    assert along[0]["fid"] != pytest.approx(scored, rel=1e-3)


def test_only_the_unit_that_is_missing_is_made_again(sharded_storage):
    words = ("name=again", "figures.images=4", "figures.which=[interpolation,progressive]")
    run = ready(tiny_experiment(*words), sharded_storage)
    assert len(run_stage(figures, run)) == 5
    picture = run.figures / "interpolation.png"
    before = picture.read_bytes()
    units = {file: file.stat().st_mtime_ns for file in run.figure_units.rglob("*.npz")}
    (gone,) = run.figure_units.glob("mixed-*/0002-*.npz")
    gone.unlink()
    assert figures.STAGE.is_done(run), "what is sealed needs no units"
    picture.unlink()
    assert not figures.STAGE.is_done(run)
    assert run_stage(figures, run) == ["interpolation of pair 2 after 10 steps"]
    assert figures.STAGE.is_done(run) and picture.read_bytes() == before
    assert [file for file, written in units.items() if file.stat().st_mtime_ns != written] == [gone]
    more = run_stage(figures, change(run, "figures", images=5))
    assert sorted(more) == ["interpolation of pair 4 after 10 steps", "progressive 0-4"]


def test_what_cannot_be_drawn_is_left_out_with_its_reason(sharded_storage, caplog, undrawn):
    wanted = "[samples,rate_distortion,scores_along,nearest_features]"
    run = ready(tiny_experiment("name=unscored", f"figures.which={wanted}"), sharded_storage)
    with caplog.at_level(logging.WARNING):
        assert run_stage(figures, run) == []
    manifest = read_manifest(run.figures, dict)
    assert manifest["order"] == ["samples.png"]
    assert "`ddpm evaluate unscored`" in manifest["skipped"]["rate_distortion"]
    assert set(manifest["skipped"]) == {"rate_distortion", "scores_along", "nearest_features"}
    assert "figure rate_distortion is left out: it needs the bound" in caplog.text
    assert not figures.STAGE.is_done(run), "an evaluation may still come"
    run_stage(evaluate, run)
    assert not figures.STAGE.is_done(run), "what waited for it can be drawn"
    run_stage(figures, run)
    manifest = read_manifest(run.figures, dict)
    assert manifest["order"] == ["samples.png", "rate_distortion.svg"]
    assert set(manifest["skipped"]) == {"scores_along", "nearest_features"}, "metrics=[nll] makes no features"
    assert figures.STAGE.is_done(run), "nothing more can come of this evaluation"


@pytest.mark.parametrize("how", [{"variance": "fixedsmall"}, {"sampler": "dpm++", "eta": 0.0}])
def test_figures_run_the_chain_of_the_samples(sharded_storage, how):
    which = "figures.which=[progressive,interpolation,shared_latents]"
    run = ready(tiny_experiment("name=respaced", which, "figures.images=4"), sharded_storage, steps=5, **how)
    run_stage(figures, run)
    shown = cells(run.figures / "progressive.png")
    assert shown.shape[:2] == (4, 5) and nearly_equal(shown[:, -1], samples_of(run, 4)[:, 0])
    captions = read_manifest(run.figures, dict)["captions"]
    assert all("T = 20, respaced to 5 steps" in caption for caption in captions.values())
    # Steps 0, 5, 10, 14, 19 of T = 20: two of them make t = 6.
    assert "latents at t = 6:" in captions["interpolation.png"]
    assert "for t = 20, 15, 6, 1, left" in captions["shared_latents.png"]


def test_a_network_that_takes_labels_draws_every_figure(sharded_storage, monkeypatch, undrawn):
    small = (
        "diffusion.timesteps=2", "model.channels=8", "model.norm_groups=4", "train.steps=1",
        "sample.num_images=12", "sample.batch_size=6", "sample.steps=null", "evaluate.nll_images=4",
        "figures.images=3", "evaluate.nll_timesteps=null", *SCORED[:2], EVERY,
    )  # fmt: skip
    experiment = config.load_experiment("context_digits", list(small))
    assert experiment.sample.label == "cycle" and experiment.sample.guidance_scale > 1
    run = ready(experiment, sharded_storage)
    run_stage(evaluate, run)
    forward = create_autospec(ContextUNet.forward, side_effect=ContextUNet.forward)
    monkeypatch.setattr(ContextUNet, "forward", forward)
    run_stage(figures, run)
    manifest = read_manifest(run.figures, dict)
    assert manifest["order"] == PICTURES and manifest["skipped"] == {}
    calls = [call.args[1:] for call in forward.call_args_list]
    asked = [labels.tolist() for _, _, *given in calls for labels in given]
    assert [0, 1, 2, NO_LABEL, NO_LABEL, NO_LABEL] in asked, "chosen and unconditional rows, in one call"
    between = [given for x_t, _, *given in calls if len(x_t) == len(chains.LAMBDAS)]
    assert between and not any(between), "two images can be of two classes"
    shown = cells(run.figures / "progressive.png")
    assert nearly_equal(shown[:, -1], samples_of(run, 3)[:, 0]), "guided as the samples are"


def test_the_linear_denoiser_is_the_matrix_formula(tiny_run):
    """By an inverse instead of eigenvectors, with the singular covariance of the digits, whose corners are constant."""
    one_cpu().run_units(list_gaussian_units(tiny_run), lambda unit: None)
    train = tars.load_images(tiny_run.data, "train")[0].reshape(-1, 64) / 127.5 - 1
    mean, covariance = train.mean(axis=0), np.cov(train, rowvar=False, bias=True)
    assert np.linalg.matrix_rank(covariance) < 64
    diffusion = Diffusion(tiny_run.experiment.diffusion)
    net, _ = load_linear_denoiser(tiny_run, diffusion, torch.device("cpu"))
    mse = compute_linear_mse(load_variances(tiny_run)[0], diffusion.tables["alpha_bar"])
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


def test_rows_and_errors_of_the_distance():
    levels = optimum.list_levels(Diffusion())
    assert (levels[:2], levels[-1], len(levels)) == ([950, 900], 0, 20)
    k, line = [100, 200, 300, 1000], np.array([63.55, 61.28, 55.95, 1.17])
    found = optimum.describe_distance(k, np.array([124.34, 100.09, 68.10, 1.062]), line, 64.08)
    assert "RMSE 124.34" in found and "63.55 (+95.7%)" in found and "k = 300" in found
    assert "mean image" not in optimum.describe_distance(k, 0.99 * line, line, 64.08)
    line = np.array([[1.0, 3.0, 2.0, 6.0]])
    excess, error = optimum.compare_errors(1.21 * line, line)
    assert excess[0] == pytest.approx(0.1) and error[0] == pytest.approx(0, abs=1e-12)

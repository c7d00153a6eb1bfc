"""The NLL bound of a split of the data: its units and their average."""

from pathlib import Path

import numpy as np
import torch

from ddpm.config import Variance
from ddpm.denoisers import compute_profile
from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from ddpm.likelihood import BoundTerms, compute_bits_per_dim, compute_rate_distortion, draw_timesteps
from ddpm.rng import Stream, draw_normal
from pipeline.compute.units import Unit, UnitKind, Worker, make_image_units
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.scores.image_sets import hash_shards
from pipeline.scores.metrics import Bound, Scores, add_error
from pipeline.scores.preparations import load_variances
from pipeline.store import checkpoint, tars
from pipeline.store.arrays import read_unit_arrays, write_unit_arrays
from pipeline.store.keys import hash_content
from pipeline.store.run import Place

MOST_IMAGES, MOST_PIXELS = 256, 2**18  # of a network call of the bound


def hash_weights(place: Place) -> str | None:
    """Return the sha256 of the weights that are sampled; None if they are not there."""
    folder = place.locate_step(place.experiment.checkpoint_step)
    file = checkpoint.name_weights_file(place.experiment.sample.weights, place.experiment.ema_number)
    return checkpoint.read_meta(folder)["files"][file]["sha256"] if folder.is_dir() else None


def choose_bound_variance(experiment: Experiment) -> Variance:
    return experiment.evaluate.variance or experiment.diffusion.variance


def count_images(place: Place) -> tuple[int, int]:
    """Return the number of images to score, and of all in the split. Raises PipelineError if there are too few."""
    split = place.experiment.evaluate.nll_split
    there = tars.open_shards(place.data).count_images(split)
    scored = place.experiment.evaluate.nll_images or there
    if scored > there:
        raise PipelineError(f"evaluate.nll_images is {scored}, but the {split} split has {there}; lower it")
    return scored, there


def load_profile(place: Place) -> tuple[torch.Tensor, str]:
    """Return the shares (T,) by which the timesteps of the estimate are drawn, and a description with their hash.

    They belong to the training images, the schedule and the variance of the bound. The Gaussian must be on disk.
    """
    (variances, source), diffusion = load_variances(place), Diffusion(place.experiment.diffusion)
    q = compute_profile(diffusion, variances, choose_bound_variance(place.experiment))
    return q, f"{hash_content([float(f'{share:.9g}') for share in q])}, from {source}"


def plan_units(place: Place) -> dict[Path, Unit]:
    """Return {file of a bound: unit}, one for each range of images.

    The folder's key covers all that the bound depends on; how samples are drawn does not belong to it.
    """
    experiment, config = place.experiment, place.experiment.evaluate
    split = hash_shards(tars.open_shards(place.data).list_shards(config.nll_split))
    step, weights = experiment.checkpoint_step, str(experiment.sample.weights)
    if number := experiment.ema_number:
        weights += f" {number}"
    network = [place.run_key, step, weights, hash_weights(place), config.precision]
    q, draws, passes = None, None, experiment.diffusion.timesteps
    if config.nll_timesteps:
        q, profile = load_profile(place)
        draws, passes = [config.nll_timesteps, profile], 1 + config.nll_timesteps
    variance = choose_bound_variance(experiment)
    key = hash_content([place.run_key, network, split, config.decoder, variance, draws])
    return make_image_units(
        UnitKind.NLL, write_bound, (place, q), count_images(place)[0], config.nll_batch_size,
        place.score_units / f"nll-{key}", f"NLL of {config.nll_split} images", passes,
    )  # fmt: skip


def write_bound(ctx: Worker, place: Place, q: torch.Tensor | None, start: int, stop: int, file: Path) -> None:
    """Write the terms of the bound of images [start, stop), float32 (body of a unit).

    q: the shares by which timesteps are drawn; then the weights of the terms are written too. None: all are evaluated.
    """
    experiment, config = place.experiment, place.experiment.evaluate
    pixels, classes = tars.load_images(place.data, config.nll_split, start, stop)
    index, shape, timesteps, arrays = torch.arange(start, stop), experiment.data.shape, None, {}
    if q is not None:
        timesteps, weights = draw_timesteps(q, experiment.seed, index, config.nll_timesteps or 0)
        arrays = {"weights": weights.numpy(), "timesteps": timesteps.numpy()}
    index, n = index.to(ctx.device), stop - start
    # Timesteps share a network call: with few images, most of its time is overhead.
    shared = max(1, min(MOST_IMAGES, MOST_PIXELS // (shape[1] * shape[2])) // n)
    result = compute_bits_per_dim(
        Diffusion(experiment.diffusion),
        checkpoint.load_model(place, ctx.device, config.precision, config.compile, config.graph).net,
        from_uint8(torch.from_numpy(pixels).to(ctx.device)),
        lambda t, rows: draw_normal(experiment.seed, Stream.NLL, t, index[rows], shape), timesteps=timesteps,
        batch_size=shared * n, decoder=config.decoder, variance=config.variance,
        context=torch.from_numpy(classes).to(ctx.device) if experiment.model.takes_labels else None,
    )  # fmt: skip
    arrays |= {name: getattr(result, name).float().numpy() for name in ("terms", "mse", "prior")}
    write_unit_arrays(file, **arrays)


def average_bound(units: dict[Path, Unit], timesteps: int, draws: int | None = None) -> tuple[Scores, Bound]:
    """Average the bound over all images. Raises PipelineError naming a unit of other images or timesteps.

    With `draws`, the terms at so many drawn timesteps stand for all. The errors are those of means over images.
    """
    width, images = 1 + draws if draws else timesteps, []
    terms, mse = np.zeros(timesteps), np.zeros(timesteps)  # sums, if all timesteps are there
    for file, unit in units.items():
        arrays = read_unit_arrays(file)
        if arrays["terms"].shape != (unit.images, width):
            raise PipelineError(
                f"{file} holds terms of shape {arrays['terms'].shape}, not ({unit.images}, {width}); "
                "delete it to have it made again"
            )
        if not draws:
            terms += arrays["terms"].sum(axis=0, dtype=np.float64)
            mse += arrays["mse"].sum(axis=0, dtype=np.float64)
        sent = (arrays["terms"] * arrays.get("weights", np.ones(1)))[:, 1:]
        rate, prior = arrays["prior"] + sent.sum(axis=1), arrays["prior"]
        columns = rate, arrays["terms"][:, 0], arrays["mse"][:, 0], prior
        within = draws * sent.var(axis=1, ddof=1) if draws and draws > 1 else np.zeros(unit.images)
        images.append(np.stack([*columns, within]))
    rate, distortion, error, prior, within = np.concatenate(images, axis=1).astype(np.float64)
    n, rmse = len(rate), 127.5 * float(error.mean()) ** 0.5
    scores: Scores = {"prior_bpd": float(prior.mean()), "rmse": rmse}
    by_image = {"nll_bpd": rate + distortion, "rate_bpd": rate, "distortion_bpd": distortion}
    scores |= {name: float(values.mean()) for name, values in by_image.items()}
    by_image["rmse"] = error * (127.5**2 / (2 * rmse) if rmse else 0.0)  # the delta method
    for name, values in by_image.items():
        add_error(scores, name, float(values.std(ddof=1)) / n**0.5 if n > 1 else None, "one image")
    found: Bound = {"n": n, "prior": float(prior.mean()), "images": (rate + distortion).round(6).tolist()}
    if draws:
        set_se = float((within.mean() / n) ** 0.5) if draws > 1 else None
        return scores, found | {"draws": draws, "set_se": set_se}
    rows = (torch.from_numpy(terms / n)[None], torch.from_numpy(mse / n)[None], torch.tensor([prior.mean()]))
    curve = compute_rate_distortion(BoundTerms(torch.arange(timesteps), *rows))
    points = enumerate(zip(curve.rate.tolist(), curve.rmse.tolist(), strict=True), 1)
    return scores, found | {
        "terms": (terms / n).tolist(), "mse": (mse / n).tolist(),
        "rate_distortion": [{"k": k, "rate_bpd": rate, "rmse": rmse} for k, (rate, rmse) in points],
    }  # fmt: skip

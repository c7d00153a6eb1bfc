"""The NLL bound of a split of the data: its units and their average."""

from pathlib import Path

import numpy as np
import torch

from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from ddpm.likelihood import BoundTerms, compute_bits_per_dim, compute_rate_distortion
from ddpm.rng import Stream, draw_normal
from pipeline.compute.units import Unit, UnitKind, Worker, make_image_units
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.scores.image_sets import hash_shards
from pipeline.scores.results import Bound, Scores
from pipeline.store import checkpoint, tars
from pipeline.store.files import read_unit_arrays, write_unit_arrays
from pipeline.store.keys import hash_content
from pipeline.store.run import Place

CALL = (256, 2**18)  # images and pixels that one network call of the bound takes at most


def hash_weights(place: Place) -> str | None:
    """Return the sha256 of the weights that are sampled; None if they are not there."""
    folder = place.step_folder(place.experiment.checkpoint_step)
    file = checkpoint.EMA if place.experiment.sample.weights == "ema" else checkpoint.STATE
    return checkpoint.read_meta(folder)["files"][file]["sha256"] if folder.is_dir() else None


def choose_bound_variance(experiment: Experiment) -> str:
    """Return the variance of the bound: evaluate.variance, or that of the diffusion."""
    return experiment.evaluate.variance or experiment.diffusion.variance


def count_images(place: Place) -> tuple[int, int]:
    """Return the numbers of scored and of all images of the split. Raises PipelineError if too few."""
    split = place.experiment.evaluate.nll_split
    there = tars.open_shards(place.data).count_images(split)
    scored = place.experiment.evaluate.nll_images or there
    if scored > there:
        raise PipelineError(
            f"evaluate.nll_images is {scored}, but the {split} split has {there} images; lower it"
        )
    return scored, there


def plan_units(place: Place) -> dict[Path, Unit]:
    """Return {file of a bound: unit}, one for each range of images.

    The folder's key covers all that the bound depends on; how samples are drawn does not belong to it.
    """
    experiment, config = place.experiment, place.experiment.evaluate
    split = hash_shards(tars.open_shards(place.data).list_shards(config.nll_split))
    step, weights = experiment.checkpoint_step, experiment.sample.weights
    network = [place.run_key, step, weights, hash_weights(place), config.precision]
    # The null was once the timesteps of a part of the bound; without it every key would change.
    key = hash_content(
        [place.run_key, network, split, config.decoder, choose_bound_variance(experiment), None]
    )
    return make_image_units(
        UnitKind.NLL, write_bound, (place,), count_images(place)[0], config.nll_batch_size,
        place.score_units / f"nll-{key}", f"NLL of {config.nll_split} images", experiment.diffusion.timesteps,
    )  # fmt: skip


def write_bound(ctx: Worker, place: Place, start: int, stop: int, file: Path) -> None:
    """Write the terms of the bound of images [start, stop), float32 (body of a unit)."""
    experiment, config = place.experiment, place.experiment.evaluate
    pixels, classes = tars.load_images(place.data, config.nll_split, start, stop)
    index, shape = torch.arange(start, stop, device=ctx.device), experiment.data.shape
    result = compute_bits_per_dim(
        Diffusion(experiment.diffusion),
        checkpoint.load_network(place, ctx.device, config.precision),
        from_uint8(torch.from_numpy(pixels).to(ctx.device)),
        lambda t: draw_normal(experiment.seed, Stream.NLL, t, index, shape),
        timesteps_per_call=choose_timesteps_per_call(stop - start, shape),
        decoder=config.decoder,
        variance=config.variance,
        context=torch.from_numpy(classes).to(ctx.device) if experiment.takes_labels else None,
    )
    arrays = {name: getattr(result, name).float().numpy() for name in ("terms", "mse", "prior")}
    write_unit_arrays(file, **arrays)


def choose_timesteps_per_call(images: int, shape: tuple[int, int, int]) -> int:
    """Return how many timesteps share a network call; a call with few images would spend its time on overhead."""
    most_images, most_pixels = CALL
    return max(1, min(most_images, most_pixels // (shape[1] * shape[2])) // images)


def average_bound(units: dict[Path, Unit], timesteps: int) -> tuple[Scores, Bound]:
    """Average the bound over all images. Raises PipelineError naming a unit of other images or timesteps."""
    terms, mse, prior, n = np.zeros(timesteps), np.zeros(timesteps), 0.0, 0
    for file, unit in units.items():
        arrays = read_unit_arrays(file)
        if arrays["terms"].shape != (unit.images, timesteps):
            raise PipelineError(
                f"{file} holds terms of shape {arrays['terms'].shape}, not ({unit.images}, {timesteps}); "
                "delete it to have it made again"
            )
        terms += arrays["terms"].sum(axis=0, dtype=np.float64)
        mse += arrays["mse"].sum(axis=0, dtype=np.float64)
        prior += float(arrays["prior"].sum(dtype=np.float64))
        n += unit.images
    terms, mse, prior = terms / n, mse / n, prior / n
    rows = (torch.from_numpy(terms)[None], torch.from_numpy(mse)[None], torch.tensor([prior]).double())
    mean = BoundTerms(torch.arange(timesteps), *rows)
    curve = compute_rate_distortion(mean)
    scores = {
        "nll_bpd": float(mean.total), "rate_bpd": float(curve.rate[-1]), "distortion_bpd": curve.distortion,
        "prior_bpd": prior, "rmse": float(curve.rmse[-1]),
    }  # fmt: skip
    points = enumerate(zip(curve.rate.tolist(), curve.rmse.tolist(), strict=True), 1)
    return scores, {
        "terms": terms.tolist(), "mse": mse.tolist(), "prior": prior, "n": n,
        "rate_distortion": [{"k": k, "rate_bpd": rate, "rmse": rmse} for k, (rate, rmse) in points],
    }  # fmt: skip

"""The samples (Fig. 13), and the figures that run the reverse process (Figs. 6, 7, 8, 9 and 14).

They run the same chain as the samples. A t that the paper names for T = 1000 becomes the same share of the chain's
steps.
"""

import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ddpm import sampler
from ddpm.config import Sampler
from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8, to_uint8
from ddpm.rng import Stream, draw_normal
from pipeline.compute.units import Unit, UnitKind, Worker, make_image_units, make_network_unit
from pipeline.config import Experiment
from pipeline.drawing.grids import save_grid
from pipeline.stages.figures import Figure, count_rows, describe_chain, locate_unit_folder
from pipeline.store import tars
from pipeline.store.arrays import read_arrays, write_arrays
from pipeline.store.checkpoint import load_model
from pipeline.store.run import Place

SAMPLES_SIDE = 16  # most rows of the figure of samples
UNIT_IMAGES = 8  # chains in a unit of the progressive figure
SNAPSHOTS = 10
PASSES = (10, 20, 50, 100)  # of the network, in the figure of the steps
SAMPLERS: tuple[Sampler, ...] = ("ddim", "dpm++")  # a row of each
LAMBDAS = tuple(i / 10 for i in range(11))  # 0 and 1 reconstruct the sources
INTERPOLATED_AT = 0.5  # Fig. 8: t = 500
COARSE_TO_FINE = (1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0)  # Fig. 9: 1000 ... 0 steps
SHARED = (1, 0.75, 0.5, 0.25)  # Fig. 7: t = 1000, 750, 500, 250
CHILDREN = 3  # images from each shared latent
CHILDREN_FROM = 2**16  # their indices in the stream of the figures; the pairs' begin at 0


def build_diffusion(experiment: Experiment) -> Diffusion:
    """Build the diffusion of all T steps, or of sample.steps of them."""
    diffusion, config = Diffusion(experiment.diffusion), experiment.sample
    if config.steps is None:
        return diffusion
    return diffusion.respace(sampler.space_timesteps(diffusion, config.steps, config.spacing))


def count_chain_steps(share: float, experiment: Experiment) -> int:
    """Return the number of steps in a fraction of the chain; at least 1 unless the fraction is 0."""
    return max(1 if share else 0, round(share * len(build_diffusion(experiment))))


def format_timesteps(counts: list[int], experiment: Experiment) -> str:
    """Return the paper's t (from 1) as text, for numbers of remaining steps; 0 is the image."""
    timesteps = build_diffusion(experiment).timesteps
    return ", ".join(f"{int(timesteps[steps - 1]) + 1 if steps else 0:,}" for steps in dict.fromkeys(counts))


def save_rows(files: list[Path], file: Path, dim: int = 0) -> None:
    """Save one grid of the units' images (rows, columns, C, H, W), uint8; a unit has some rows, or columns (dim=1)."""
    rows = torch.cat([torch.from_numpy(read_arrays(unit)["images"]) for unit in files], dim=dim)
    save_grid(rows.flatten(0, 1), rows.shape[1], file)


def plan_samples(place: Place) -> Figure:
    """Plan Fig. 13: a grid of the first samples."""
    caption = "Unconditional samples" if place.experiment.sample.label is None else "Samples"
    n = min(SAMPLES_SIDE**2, place.experiment.sample.num_images)

    def draw(files: list[Path], file: Path) -> None:
        images, _ = tars.load_images(place.samples, "samples", 0, n)
        save_grid(torch.from_numpy(images), int(n**0.5), file)

    return Figure("samples.png", f"{caption}, the first ones, not selected (paper, Fig. 13)", {}, draw)


def plan_progressive_generation(place: Place) -> Figure:
    """Plan Figs. 6 and 14: a row of snapshots for each of the first samples."""
    n, folder = count_rows(place.experiment), locate_unit_folder(place, "progressive")
    passes = count_chain_steps(1, place.experiment)
    units = make_image_units(
        UnitKind.FIGURE, write_snapshots, (place,), n, UNIT_IMAGES, folder, "progressive", passes
    )
    caption = (
        "Progressive generation: the estimate of x_0 along the reverse process of the first samples, left to "
        f"right, after each tenth of the steps (paper, Figs. 6 and 14; {describe_chain(place.experiment)})"
    )
    return Figure("progressive.png", caption, units, save_rows)


def write_snapshots(ctx: Worker, place: Place, start: int, stop: int, file: Path) -> None:
    """Write a row of snapshots for each of samples [start, stop) (body of a unit)."""
    write_arrays(file, images=make_snapshots(ctx, place, start, stop).transpose(0, 1).numpy())


def make_snapshots(ctx: Worker, place: Place, start: int, stop: int) -> Tensor:
    """Make evenly spaced snapshots of the chains of samples [start, stop): estimates of x_0, the last is the sample.

    Returns uint8 (snapshots, images, C, H, W) on the CPU.
    """
    config = place.experiment.sample
    model = load_model(place, ctx.device, config.precision)
    chain = model.run_chains(torch.arange(start, stop, device=ctx.device))
    wanted = list_snapshots(config.steps or len(model.diffusion))
    return torch.stack([to_uint8(step.x_0).cpu() for number, step in enumerate(chain, 1) if number in wanted])


def list_snapshots(steps: int) -> list[int]:
    """Return the steps, of 1..steps, after which a snapshot is taken: the last of each tenth."""
    return sorted({-(-number * steps // SNAPSHOTS) for number in range(1, SNAPSHOTS + 1)})


def plan_steps(place: Place) -> Figure:
    """Plan two rows for each of the first samples, without and with fresh noise, by shorter and longer chains."""
    n, folder = count_rows(place.experiment), locate_unit_folder(place, "steps", "dpm++")
    counts = sorted({min(count, place.experiment.diffusion.timesteps) for count in PASSES})
    passes = 4 * sum(counts)  # two samplers, each with eta = 0 and 1
    units = make_image_units(
        UnitKind.FIGURE, write_steps, (place, counts), n, UNIT_IMAGES, folder, "steps", passes
    )
    caption = (
        f"The first samples in {', '.join(map(str, counts))} steps, by DDIM and below by DPM-Solver++: left "
        "with eta = 0, which keeps the errors of an unfinished network to the end; right with eta = 1, whose noise "
        "lets the next steps correct them"
    )
    return Figure("steps.png", caption, units, save_rows)


def write_steps(ctx: Worker, place: Place, counts: list[int], start: int, stop: int, file: Path) -> None:
    """Write rows (2 (stop - start), 2 counts, C, H, W) of samples [start, stop), eta = 0 first (body of a unit)."""
    model = load_model(place, ctx.device, place.experiment.sample.precision)
    images = [
        model.sample(stop - start, first=start, sampler=name, steps=count, spacing="uniform", eta=eta)
        for name in SAMPLERS
        for eta in (0.0, 1.0)
        for count in counts
    ]
    rows = torch.stack(images, dim=1).unflatten(1, (len(SAMPLERS), -1)).flatten(0, 1)
    write_arrays(file, images=to_uint8(rows).cpu().numpy())


def plan_interpolation(place: Place) -> Figure:
    steps = count_chain_steps(INTERPOLATED_AT, place.experiment)
    units = plan_pairs(place, range(count_rows(place.experiment)), [steps])
    caption = (
        f"Interpolation of latents at t = {format_timesteps([steps], place.experiment)}: source, its reconstruction "
        f"(λ = 0), λ = 0.1 to 0.9, reconstruction (λ = 1), source; {choose_pair_split(place)} images, a pair in a row, "
        f"the noise shared (paper, Fig. 8; {describe_chain(place.experiment)})"
    )
    return Figure("interpolation.png", caption, units, save_rows)


def plan_coarse_to_fine(place: Place) -> Figure:
    counts = [count_chain_steps(share, place.experiment) for share in COARSE_TO_FINE]
    units = plan_pairs(place, [0], counts)
    caption = (
        "Coarse to fine: the first pair of the interpolation, diffused to "
        f"t = {format_timesteps(counts, place.experiment)} from top to bottom before its latents are mixed "
        f"(paper, Fig. 9; {describe_chain(place.experiment)})"
    )
    return Figure("coarse_to_fine.png", caption, units, save_rows)


def plan_pairs(place: Place, pairs: Iterable[int], counts: Iterable[int]) -> dict[Path, Unit]:
    """Plan the units of pairs of images, each for these numbers of steps, for Figs. 8 and 9; return them by file."""
    units = dict[Path, Unit]()
    for pair, steps in itertools.product(pairs, counts):
        file = locate_unit_folder(place, "mixed") / f"{pair:04d}-{steps:04d}.npz"
        args, name = (place, pair, steps), f"interpolation of pair {pair} after {steps} steps"
        units |= make_network_unit(UnitKind.FIGURE, write_pair, args, file, name, len(LAMBDAS), max(1, steps))
    return units


def write_pair(ctx: Worker, place: Place, pair: int, steps: int, file: Path) -> None:
    """Write one row, (1, 13, C, H, W), of two images and between them their mixtures (body of a unit).

    All mixtures have the same noise. They have no class and no guidance, since the two classes can differ.
    """
    experiment, config, split = place.experiment, place.experiment.sample, choose_pair_split(place)
    count = tars.open_shards(place.data).count_images(split)
    start = 2 * pair % max(1, count - 1)  # if there are too few images, pairs repeat
    images, _ = tars.load_images(place.data, split, start, min(start + 2, count))
    a, b = torch.from_numpy(images[[0, -1]])
    shape, index = (len(LAMBDAS), *experiment.data.shape), torch.tensor([pair], device=ctx.device)

    def noise(t: int) -> Tensor:
        return draw_normal(experiment.seed, Stream.FIGURES, t, index, experiment.data.shape).expand(shape)

    net = load_model(place, ctx.device, config.precision).net
    x_a, x_b = (from_uint8(image).to(ctx.device).expand(shape) for image in (a, b))
    eps = noise(experiment.diffusion.timesteps)  # a step that the chain does not have
    mixtures = sampler.interpolate(
        build_diffusion(experiment).to(ctx.device), net, x_a, x_b, torch.tensor(LAMBDAS, device=ctx.device),
        steps, eps, noise, variance=sampler.choose_ancestral_variance(config.sampler, config.variance),
    )  # fmt: skip
    row = torch.cat([a[None], to_uint8(mixtures).cpu(), b[None]])
    write_arrays(file, images=row[None].numpy())


def choose_pair_split(place: Place) -> str:
    """Choose the split whose images are interpolated: the test split if there is one."""
    return "test" if "test" in tars.open_shards(place.data).splits else "train"


def plan_shared_latents(place: Place) -> Figure:
    """Plan Fig. 7: images that share a latent, for each of four t."""
    n, units = count_rows(place.experiment), dict[Path, Unit]()
    counts = [count_chain_steps(share, place.experiment) for share in SHARED]
    for steps in dict.fromkeys(counts):
        file = locate_unit_folder(place, "shared") / f"{n:04d}-{steps:04d}.npz"
        args, name, images = (place, n, steps), f"images that share x_t after {steps} steps", n * CHILDREN
        units |= make_network_unit(
            UnitKind.FIGURE, write_shared_latents, args, file, name, images, max(1, steps)
        )
    caption = (
        f"Images that share a latent: x_t, then {CHILDREN} images from it, for "
        f"t = {format_timesteps(counts, place.experiment)}, left to right; a chain in a row "
        f"(paper, Fig. 7; {describe_chain(place.experiment)})"
    )
    return Figure("shared_latents.png", caption, units, partial(save_rows, dim=1))


def write_shared_latents(ctx: Worker, place: Place, n: int, steps: int, file: Path) -> None:
    """Write (n, 1 + children, C, H, W), each row a latent and its images (body of a unit)."""
    x_t, children = draw_from_latents(ctx, place, n, steps)
    rows = torch.cat([x_t[:, None], children.unflatten(0, (n, CHILDREN))], dim=1)
    write_arrays(file, images=to_uint8(rows).cpu().numpy())


def draw_from_latents(ctx: Worker, place: Place, n: int, steps: int) -> tuple[Tensor, Tensor]:
    """Draw x_t (n, C, H, W) of the first n samples' chains, and from each the images (n * children, C, H, W)."""
    experiment, config = place.experiment, place.experiment.sample
    chain = build_diffusion(experiment)
    variance = sampler.choose_ancestral_variance(config.sampler, config.variance)
    model = load_model(place, ctx.device, config.precision)
    draw = partial(draw_normal, experiment.seed, shape=experiment.data.shape)
    index = torch.arange(n, device=ctx.device)
    labels = model.make_context(config.label, index)
    net = model.guide(labels, config.guidance_scale)
    x_t = sampler.draw_shared_latent(
        chain, net, draw(Stream.X_T, 0, index), lambda t: draw(Stream.REVERSE, t, index), steps,
        variance=variance, context=labels,
    )  # fmt: skip
    children = CHILDREN_FROM + torch.arange(n * CHILDREN, device=ctx.device)
    *_, last = sampler.run_chain(
        chain, net, x_t.repeat_interleave(CHILDREN, 0), lambda t: draw(Stream.FIGURES, t, children),
        variance=variance, timesteps=range(steps),
        context=None if labels is None else labels.repeat_interleave(CHILDREN),
    )  # fmt: skip
    return x_t, last.x_t

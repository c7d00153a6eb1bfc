"""The figures that run the reverse process: Figs. 6 and 14, 7, 8 and 9.

They run the chain that samples are drawn by. Where the paper names a t for T = 1000, it is that share of the
chain's steps.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm.config import Variance
from ddpm.diffusion import Network
from ddpm.images import from_uint8, to_uint8
from ddpm.networks import NO_LABEL
from ddpm.rng import Stream, normal
from ddpm.sampler import ancestral, guided, interpolate, reverse, shared_latent
from pipeline.compute.work import Kind, Unit, WorkerContext
from pipeline.config import Experiment, checkpoint_step
from pipeline.drawing.grids import save_grid
from pipeline.stages.figures.figure import Figure, chain_of, in_words, unit_folder
from pipeline.store import tars
from pipeline.store.checkpoint import load_network
from pipeline.store.files import read_arrays, write_arrays
from pipeline.store.run import Place

UNIT_IMAGES = 8  # chains in a unit of the progressive figure
STAGES = 10
LAMBDAS = tuple(i / 10 for i in range(11))  # 0 and 1 reconstruct the sources
INTERPOLATED_AT = 0.5  # Fig. 8: t = 500
COARSE_TO_FINE = (1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0)  # Fig. 9: 1000 ... 0 steps
SHARED = (1, 0.75, 0.5, 0.25)  # Fig. 7: t = 1000, 750, 500, 250
CHILDREN = 3  # images from each shared latent
CHILDREN_FROM = 2**16  # their indices in the stream of the figures; the pairs' begin at 0


def steps_of(share: float, experiment: Experiment) -> int:
    """That share of the chain's steps; at least one, unless the share is 0."""
    return max(1 if share else 0, round(share * len(chain_of(experiment))))


def at_t(steps: int, experiment: Experiment) -> int:
    """The paper's t, counted from 1, of a latent with so many steps to go; 0 is the image."""
    return int(chain_of(experiment).timesteps[steps - 1]) + 1 if steps else 0


def network(ctx: WorkerContext, experiment: Experiment, run: Place) -> Network:
    """The network of the checkpoint, guided as samples are."""
    net, scale = plain_network(ctx, experiment, run), experiment.sample.guidance_scale
    return guided(net, scale, NO_LABEL) if scale != 1 else net


def plain_network(ctx: WorkerContext, experiment: Experiment, run: Place) -> nn.Module:
    config = experiment.sample
    return load_network(
        experiment, run, checkpoint_step(experiment), config.weights, ctx.device, config.precision
    )


def context(experiment: Experiment, index: Tensor) -> Tensor | None:
    """The classes asked for of images index (N,), on its device."""
    labels = [experiment.asked_label(number) for number in index.tolist()]
    return None if experiment.sample.label is None else torch.tensor(labels, device=index.device)


def variance_of(experiment: Experiment) -> Variance | None:
    """The variance of ancestral chains; DDIM's ancestral twin, eta = 1, is fixedsmall."""
    return "fixedsmall" if experiment.sample.sampler == "ddim" else experiment.sample.variance


def images_asked(experiment: Experiment) -> int:
    """Rows of a figure: never more than there are samples, so that small runs stay small."""
    return min(experiment.figures.images, experiment.sample.num_images)


def rows_of(files: list[Path]) -> Tensor:
    """The images (rows, columns, C, H, W), uint8, of the units' files."""
    parts = []
    for file in files:
        parts.append(torch.from_numpy(read_arrays(file)["images"]))
    return torch.cat(parts)


def draw_rows(files: list[Path], file: Path) -> None:
    rows = rows_of(files)
    save_grid(rows.flatten(0, 1), rows.shape[1], file)


# Figs. 6 and 14


def progressive(experiment: Experiment, run: Place) -> Figure:
    n, folder = images_asked(experiment), unit_folder(experiment, run, "progressive")
    units = {}
    for start in range(0, n, UNIT_IMAGES):
        stop = min(start + UNIT_IMAGES, n)
        file = folder / f"{start:06d}-{stop:06d}.npz"
        args = (experiment, run, start, stop, file)
        name = f"progressive {start}-{stop - 1}"
        units[file] = Unit(Kind.FIGURE, keep_estimates, args, name, stop - start, needs_gpu=True)
    caption = (
        "Progressive generation: the estimate of x_0 along the reverse process of the first samples, left to "
        f"right, after each tenth of the steps (paper, Figs. 6 and 14; {in_words(experiment)})"
    )
    return Figure("progressive.png", caption, units, draw_rows)


def keep_estimates(
    ctx: WorkerContext, experiment: Experiment, run: Place, start: int, stop: int, file: Path
) -> None:
    """The work unit: a row for each of samples [start, stop)."""
    stages = estimates(ctx, experiment, run, start, stop)
    write_arrays(file, images=to_uint8(stages.transpose(0, 1)).numpy())


def estimates(ctx: WorkerContext, experiment: Experiment, run: Place, start: int, stop: int) -> Tensor:
    """Estimates of x_0 in [-1, 1], (stages, images, C, H, W), on the CPU, evenly spaced over the chains of
    samples [start, stop); the last is their end."""
    config, index = experiment.sample, torch.arange(start, stop, device=ctx.device)
    diffusion = chain_of(experiment)
    chain = reverse(
        diffusion, network(ctx, experiment, run), index=index, shape=experiment.data.shape,
        seed=experiment.seed, sampler=config.sampler, eta=config.eta, variance=config.variance,
        context=context(experiment, index), device=ctx.device,
    )  # fmt: skip
    kept = shown_steps(len(diffusion))
    return torch.stack([step.x_0.cpu() for number, step in enumerate(chain, 1) if number in kept])


def shown_steps(steps: int) -> list[int]:
    """Which of 1..steps are shown: the end of each tenth of the chain."""
    return sorted({-(-stage * steps // STAGES) for stage in range(1, STAGES + 1)})


# Figs. 8 and 9


def interpolation(experiment: Experiment, run: Place) -> Figure:
    steps = steps_of(INTERPOLATED_AT, experiment)
    units = dict(mixing_unit(experiment, run, pair, steps) for pair in range(images_asked(experiment)))
    caption = (
        f"Interpolation of latents at t = {at_t(steps, experiment):,}: source, its reconstruction (λ = 0), "
        f"λ = 0.1 to 0.9, reconstruction (λ = 1), source; {split_of(run)} images, a pair in a row, the noise "
        f"shared (paper, Fig. 8; {in_words(experiment)})"
    )
    return Figure("interpolation.png", caption, units, draw_rows)


def coarse_to_fine(experiment: Experiment, run: Place) -> Figure:
    counts = [steps_of(share, experiment) for share in COARSE_TO_FINE]
    units = dict(mixing_unit(experiment, run, 0, steps) for steps in counts)
    said = ", ".join(f"{at_t(steps, experiment):,}" for steps in dict.fromkeys(counts))
    caption = (
        f"Coarse to fine: the first pair of the interpolation, diffused to t = {said} from top to bottom "
        f"before its latents are mixed (paper, Fig. 9; {in_words(experiment)})"
    )
    return Figure("coarse_to_fine.png", caption, units, draw_rows)


def mixing_unit(experiment: Experiment, run: Place, pair: int, steps: int) -> tuple[Path, Unit]:
    """Both figures share what both show."""
    file = unit_folder(experiment, run, "mixed") / f"{pair:04d}-{steps:04d}.npz"
    args = (experiment, run, pair, steps, file)
    name = f"interpolation of pair {pair} after {steps} steps"
    return file, Unit(Kind.FIGURE, keep_mixed, args, name, len(LAMBDAS), needs_gpu=True)


def keep_mixed(
    ctx: WorkerContext, experiment: Experiment, run: Place, pair: int, steps: int, file: Path
) -> None:
    """The work unit: one row, (1, 13, C, H, W)."""
    a, b = sources(run, pair)
    between = mixed(ctx, experiment, run, a, b, pair, steps)
    row = torch.cat([a[None], to_uint8(between).cpu(), b[None]])
    write_arrays(file, images=row[None].numpy())


def mixed(
    ctx: WorkerContext, experiment: Experiment, run: Place, a: Tensor, b: Tensor, pair: int, steps: int
) -> Tensor:
    """Images (11, C, H, W) for the lambdas between uint8 images a and b, all from the pair's draw of the noise.

    No class is asked for and nothing guides: the two sources can be of two classes.
    """
    chain, shape, rows = chain_of(experiment), experiment.data.shape, len(LAMBDAS)
    index = torch.tensor([pair], device=ctx.device)

    def noise(t: int) -> Tensor:
        return normal(experiment.seed, Stream.FIGURES, t, index, shape).expand(rows, *shape)

    net = plain_network(ctx, experiment, run)
    x_a, x_b = (from_uint8(image).to(ctx.device).expand(rows, *shape) for image in (a, b))
    eps = noise(experiment.diffusion.timesteps)  # a step that the chain does not have
    return interpolate(
        chain.to(ctx.device), net, x_a, x_b, torch.tensor(LAMBDAS, device=ctx.device),
        steps, eps, noise, variance=variance_of(experiment),
    )  # fmt: skip


def split_of(run: Place) -> str:
    """The images that are interpolated: unseen ones, where there are any."""
    return "test" if "test" in tars.open_index(run.data).splits else "train"


def sources(run: Place, pair: int) -> Tensor:
    """The two images of a pair, uint8 (2, C, H, W); where there are too few, pairs come again."""
    split = split_of(run)
    count = tars.open_index(run.data).count(split)
    start = 2 * pair % max(1, count - 1)
    images, _ = tars.load_images(run.data, split, start, min(start + 2, count))
    return torch.from_numpy(images[[0, -1]])


# Fig. 7


def shared_latents(experiment: Experiment, run: Place) -> Figure:
    n, folder = images_asked(experiment), unit_folder(experiment, run, "shared")
    counts = [steps_of(share, experiment) for share in SHARED]
    units = {}
    for steps in dict.fromkeys(counts):
        file = folder / f"{n:04d}-{steps:04d}.npz"
        args = (experiment, run, n, steps, file)
        name = f"images that share x_t after {steps} steps"
        units[file] = Unit(Kind.FIGURE, keep_shared, args, name, n * CHILDREN, needs_gpu=True)
    said = ", ".join(f"{at_t(steps, experiment):,}" for steps in dict.fromkeys(counts))
    caption = (
        f"Images that share a latent: x_t, then {CHILDREN} images from it, for t = {said}, left to right; a "
        f"chain in a row (paper, Fig. 7; {in_words(experiment)})"
    )
    return Figure("shared_latents.png", caption, units, draw_beside)


def draw_beside(files: list[Path], file: Path) -> None:
    """Each unit holds some columns of all rows."""
    rows = torch.cat([rows_of([unit]) for unit in files], dim=1)
    save_grid(rows.flatten(0, 1), rows.shape[1], file)


def keep_shared(
    ctx: WorkerContext, experiment: Experiment, run: Place, n: int, steps: int, file: Path
) -> None:
    """The work unit: (n, 1 + children, C, H, W), each row a latent of the sample's chain and its images."""
    x_t, children = shared(ctx, experiment, run, n, steps)
    rows = torch.cat([x_t[:, None], children.unflatten(0, (n, CHILDREN))], dim=1)
    write_arrays(file, images=to_uint8(rows).cpu().numpy())


def shared(
    ctx: WorkerContext, experiment: Experiment, run: Place, n: int, steps: int
) -> tuple[Tensor, Tensor]:
    """x_t (n, C, H, W) on the way to the first n samples, and the images (n * children, C, H, W) from it."""
    chain, net, shape = chain_of(experiment), network(ctx, experiment, run), experiment.data.shape
    draw = partial(normal, experiment.seed, shape=shape)
    variance, index = variance_of(experiment), torch.arange(n, device=ctx.device)
    x_t = shared_latent(
        chain, net, draw(Stream.X_T, 0, index), lambda t: draw(Stream.REVERSE, t, index), steps,
        variance=variance, context=context(experiment, index),
    )  # fmt: skip
    parents = index.repeat_interleave(CHILDREN)
    children = CHILDREN_FROM + torch.arange(n * CHILDREN, device=ctx.device)
    finished = list(
        ancestral(
            chain, net, x_t.repeat_interleave(CHILDREN, 0), lambda t: draw(Stream.FIGURES, t, children),
            variance=variance, timesteps=range(steps), context=context(experiment, parents),
        )
    )  # fmt: skip
    return x_t, finished[-1].x_t

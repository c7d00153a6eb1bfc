"""`ddpm draw`: images of a trained network, as a grid, an animation, an array or a folder of pictures."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.networks import NO_LABEL
from pipeline.console import print_line, show_progress
from pipeline.errors import ConfigError, PipelineError

if TYPE_CHECKING:  # importing torch takes seconds
    from torch import Tensor

    from ddpm.model import Model

ENDINGS = (".png", ".gif", ".npz", "")
FRAMES = 50  # of an animation
BATCH = 64  # images that are drawn at once
LAMBDAS = [i / 10 for i in range(11)]


def read_numbers(text: str) -> list[float]:
    """Read numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is no number, nor several with commas between them") from None


def read_label(text: str) -> int | str | list[float]:
    """Read a class, `none`, `cycle`, or a vector of numbers."""
    if text in ("none", "cycle"):
        return NO_LABEL if text == "none" else text
    if text.isascii() and text.isdigit():
        return int(text)
    if "," in text:
        return read_numbers(text)
    raise ArgumentTypeError(f"'{text}' is no class, nor cycle, none or a vector such as 0.5,0,0.5")


def draw_images(options: Namespace, root: Path, out: Path) -> None:
    """Draw the images that the options of `ddpm draw` ask for, and write them to `out`."""
    _check_options(options, out)
    import torch

    from ddpm.images import to_uint8
    from ddpm.model import build_model
    from pipeline.engine.load import read_model

    settings, tensors = read_model(options.run, root)
    asked = {name: getattr(options, name) for name in ("seed", "label", "steps")}
    settings["options"] |= {name: value for name, value in asked.items() if value is not None}
    model = build_model(settings, tensors, "cuda" if torch.cuda.is_available() else "cpu")
    n = options.number or (1 if options.interpolate else 16)
    _warn_of_few_steps(model)
    frames = []
    try:
        parts = (
            _interpolate_files(model, n, options, out) if options.interpolate else _run_chains(model, n, out)
        )
        for part in parts:
            frames.append(to_uint8(part).cpu())
            if not bool(part.isfinite().all()):
                raise PipelineError(f"the images are not finite: the {model.source} have diverged")
    except ValueError as error:  # the science refuses what does not fit
        raise ConfigError(str(error)) from error
    images = torch.cat(frames, dim=1)
    columns = len(images[0]) // n if options.interpolate else math.ceil(math.sqrt(n))
    _write_images(images, columns, out)
    print_line(f"{out}: {len(images[0])} images, {model.source}, seed {model.options['seed']}")


def _check_options(options: Namespace, out: Path) -> None:
    """Raise ConfigError where options contradict each other, or nothing could be written."""
    if out.suffix not in ENDINGS:
        raise ConfigError(
            f"{out} must end in .png, .gif or .npz, or be a folder of pictures, without an ending"
        )
    if not out.suffix and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise PipelineError(f"{out} exists and is not empty; name a new folder")
    if out.suffix and out.is_dir():
        raise PipelineError(f"{out} is a folder; name another file")
    if not options.interpolate and (options.at is not None or options.weights):
        raise ConfigError("--lambda and --at belong to --interpolate A B")
    if options.interpolate and out.suffix == ".gif":
        raise ConfigError(
            "a .gif shows the reverse process from noise; with --interpolate, end the name in .png"
        )


def _warn_of_few_steps(model: Model) -> None:
    from ddpm.sampler import explain_few_steps

    how = model.options
    if how["sampler"] == "ancestral" and (
        reason := explain_few_steps(model.diffusion, how["steps"], how["variance"])
    ):
        print_line(f"warning: {reason}")


def _run_chains(model: Model, n: int, out: Path) -> Iterator[Tensor]:
    """Yield images, (frames, N, C, H, W), of batch after batch; more than one frame for an animation."""
    import torch

    steps = model.options["steps"] or len(model.diffusion)
    wanted = {math.ceil(steps * (i + 1) / FRAMES) for i in range(FRAMES)} if out.suffix == ".gif" else {steps}
    batches = torch.arange(n, device=model.device).split(BATCH)
    with show_progress("draw", steps * len(batches), "steps") as bar:
        for done, index in enumerate(batches):
            shots = []
            for number, step in enumerate(model.run_chains(index), 1):
                bar.update(done * steps + number)
                shots += [step.x_t] if number in wanted else []
            yield torch.stack(shots)


def _interpolate_files(model: Model, n: int, options: Namespace, out: Path) -> Iterator[Tensor]:
    """Yield rows (1, K, C, H, W) of images between two files, each with noise of its own; in a grid, between both."""
    import torch

    from ddpm.images import from_uint8

    x_a, x_b = (from_uint8(read_image(Path(file), model.shape)) for file in options.interpolate)
    weights = options.weights or LAMBDAS
    for number in range(n):
        row = model.interpolate(x_a, x_b, weights, options.at, number=number, label=options.label).cpu()
        yield (torch.cat([x_a[None], row, x_b[None]]) if out.suffix == ".png" else row)[None]


def read_image(file: Path, shape: tuple[int, int, int]) -> Tensor:
    """Read an image file as uint8 (C, H, W). Raises PipelineError where it is none of this shape."""
    import torch

    from pipeline.config import DataConfig
    from pipeline.data.sources.raw_image import DecodeError, RawImage, convert_to_record
    from pipeline.store.tars import decode_png

    channels, side, _ = shape
    data = DataConfig("folder", None, side, 1 if channels == 1 else 3, 0, 1, 0, "refuse", 0)
    try:
        record = convert_to_record("", RawImage(str(file), file.read_bytes(), None), data)
    except DecodeError as error:
        raise PipelineError(f"{file} is no image ({error}); name another file") from error
    return torch.from_numpy(decode_png(record.png).copy())


def _write_images(frames: Tensor, columns: int, out: Path) -> None:
    """Write uint8 (frames, N, C, H, W) as what the ending of `out` says; all of it or nothing."""
    from pipeline.drawing.grids import save_animation, save_grid
    from pipeline.store.files import write_arrays, write_atomically
    from pipeline.store.tars import encode_png

    images = frames[-1].permute(0, 2, 3, 1).numpy()
    if out.suffix == ".png":
        save_grid(frames[-1], columns, out)
    elif out.suffix == ".gif":
        save_animation(frames, columns, out)
    elif out.suffix == ".npz":
        write_arrays(out, arr_0=images)  # the name that numpy gives, which scripts of others read
    else:
        with write_atomically(out, folder=True) as temporary:
            for number, image in enumerate(images):
                (temporary / f"{number:05d}.png").write_bytes(encode_png(image))

"""`ddpm draw`: images of a trained network, as a grid, an animation, an array or a folder of pictures."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from ddpm.images import from_uint8, to_uint8
from ddpm.model import Label, Model, build_model
from ddpm.networks import NO_LABEL
from ddpm.sampler import explain_few_steps
from pipeline.config import ClusterConfig, DataConfig
from pipeline.console import print_line, show_progress
from pipeline.data.sources.raw_image import DecodeError, RawImage, convert_to_record
from pipeline.drawing.grids import save_animation, save_grid
from pipeline.engine.load import read_named_model
from pipeline.errors import ConfigError, PipelineError
from pipeline.store.arrays import write_arrays
from pipeline.store.files import require_output, require_regular_file, write_atomically
from pipeline.store.tars import decode_png, encode_png

FRAMES = 50  # of an animation
BATCH = 64  # images that are drawn at once
LAMBDAS = ",".join(str(i / 10) for i in range(11))


def draw_images(options: Namespace, cluster: ClusterConfig, out: Path) -> None:
    _check_options(options, out)
    label = _read_label(options.label)
    asked = {"seed": options.seed, "steps": options.steps, "label": label}
    settings, tensors = read_named_model(options.run, cluster.storage_root, cluster.tracking_uri)
    settings["options"] |= {name: value for name, value in asked.items() if value is not None}
    model = build_model(settings, tensors, "cuda" if torch.cuda.is_available() else "cpu")
    how, n = model.options, options.number or (1 if options.interpolate else 16)
    reason = explain_few_steps(model.diffusion, how["steps"], how["variance"])
    if how["sampler"] == "ancestral" and reason:
        print_line(f"warning: {reason}")
    try:
        if options.interpolate:
            frames = _interpolate_files(model, n, options, label, framed=out.suffix == ".png")
        else:
            frames = _run_chains(model, n, FRAMES if out.suffix == ".gif" else 1)
    except ValueError as error:  # ddpm refuses values that do not fit
        raise ConfigError(str(error)) from error
    if not bool(frames.isfinite().all()):
        raise PipelineError(f"the images are not finite: the {model.source} have diverged")
    count = frames.shape[1]
    _write_images(to_uint8(frames), count // n if options.interpolate else math.ceil(math.sqrt(n)), out)
    print_line(f"{out}: {count} images, {model.source}, seed {how['seed']}")


def _check_options(options: Namespace, out: Path) -> None:
    """Raise ConfigError if options contradict each other, or if `out` cannot be written."""
    if out.suffix not in (".png", ".gif", ".npz", ""):
        raise ConfigError(f"{out} must end in .png, .gif or .npz, or have no ending: a folder of pictures")
    require_output(out, folder=not out.suffix)
    if not options.interpolate and (options.at is not None or options.weights):
        raise ConfigError("--lambda and --at belong to --interpolate A B")
    if options.interpolate and out.suffix == ".gif":
        raise ConfigError(
            "a .gif shows the reverse process from noise; for --interpolate, end the name in .png"
        )


def _read_label(text: str | None) -> Label:
    """Read a class, `none`, `cycle`, or a vector of numbers with commas."""
    if text in (None, "cycle"):
        return text
    if text == "none":
        return NO_LABEL
    return int(text) if text.isascii() and text.isdigit() else _read_numbers("--label", text)


def _read_numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: numbers with commas between them are expected") from error


def _run_chains(model: Model, n: int, frames: int) -> Tensor:
    """Draw n images; return x_t (frames, n, C, H, W) at evenly spaced steps up to the last one."""
    steps = model.options["steps"] or len(model.diffusion)
    wanted, batches = {math.ceil(steps * (i + 1) / frames) for i in range(frames)}, range(0, n, BATCH)
    parts = []
    with show_progress("draw", steps * len(batches), "steps") as bar:
        for done, start in enumerate(batches):
            index, shots = torch.arange(start, min(start + BATCH, n), device=model.device), []
            for number, step in enumerate(model.run_chains(index), 1):
                bar.update(done * steps + number)
                shots += [step.x_t.cpu()] if number in wanted else []
            parts.append(torch.stack(shots))
    return torch.cat(parts, dim=1)


def _interpolate_files(model: Model, n: int, options: Namespace, label: Label, framed: bool) -> Tensor:
    """Draw n rows (1, n K, C, H, W) between two image files, each row with other noise; `framed`: add the two files."""
    x_a, x_b = (from_uint8(_read_image(Path(file), model.shape)) for file in options.interpolate)
    weights, rows = _read_numbers("--lambda", options.weights or LAMBDAS), []
    for number in range(n):
        row = model.interpolate(x_a, x_b, weights, options.at, number=number, label=label).cpu()
        rows += [x_a[None], row, x_b[None]] if framed else [row]
    return torch.cat(rows)[None]


def _read_image(file: Path, shape: tuple[int, int, int]) -> Tensor:
    """Read an image file as uint8 (C, H, W). Raises PipelineError if it is no image of this shape."""
    data = DataConfig(
        source="folder", path=None, image_size=shape[1], channels=1 if shape[0] == 1 else 3, labels=0,
        images_per_shard=1, test_images=0, resize="refuse", max_undecodable=0,
    )  # fmt: skip
    try:
        image = RawImage(str(file), require_regular_file(file).read_bytes(), None)
        record = convert_to_record("", image, data)
    except DecodeError as error:
        raise PipelineError(f"{file} is no image ({error}); name another file") from error
    return torch.tensor(decode_png(record.png))


def _write_images(frames: Tensor, columns: int, out: Path) -> None:
    """Write uint8 (frames, N, C, H, W) in the format of the ending of `out`, atomically."""
    images = frames[-1].permute(0, 2, 3, 1).numpy()
    match out.suffix:
        case ".png":
            save_grid(frames[-1], columns, out)
        case ".gif":
            save_animation(frames, columns, out)
        case ".npz":
            write_arrays(out, arr_0=images)  # numpy's own name, which other people's scripts read
        case _:
            with write_atomically(out, folder=True) as temporary:
                for number, image in enumerate(images):
                    (temporary / f"{number:05d}.png").write_bytes(encode_png(image))

"""`ddpm draw`: the images are the run's own, whatever they are written as; what cannot be drawn is named."""

import os

import numpy as np
import pytest
from PIL import Image
from staged import with_weights

from pipeline.cli.program import main
from pipeline.engine.provenance import write_record
from pipeline.store import tars


@pytest.fixture
def drawing(sampled, tmp_path, monkeypatch):
    """`ddpm draw` of a tiny run in an empty folder that holds its first two samples as files."""
    run = sampled
    write_record(run, ())
    monkeypatch.chdir(tmp_path)
    images, _ = tars.load_images(run.samples, "samples")
    for name, image in zip("ab", images[:2, 0], strict=True):
        Image.fromarray(image).save(f"{name}.png")

    def draw(words):
        return main(["draw", run.name, *words.split(), f"cluster.storage={run.storage}"])

    return draw, images.transpose(0, 2, 3, 1)


def read(file):
    return np.asarray(Image.open(file))


def test_each_ending_holds_the_first_samples_of_the_run(drawing, tmp_path, capsys):
    draw, images = drawing
    for out in ("grid.png", "reverse.gif", "images.npz", "--out folder"):
        assert draw(f"{out} -n 4") == 0
    assert "4 images, ema weights of step 6 of" in capsys.readouterr().out
    assert np.array_equal(np.load("images.npz")["arr_0"], images[:4])
    assert np.array_equal([read(f"folder/{i:05d}.png") for i in range(4)], images[:4, :, :, 0])
    grid, animation = read("grid.png"), Image.open("reverse.gif")
    assert np.array_equal(grid[1:65:8, 1:65:8, 0], images[0, :, :, 0]) and grid.shape == (132, 132, 3)
    assert animation.n_frames == 20
    animation.seek(19)
    assert np.abs(np.asarray(animation.convert("L"), int) - grid[..., 0]).max() <= 2
    assert draw("other.npz -n 4 --seed 1") == draw("fewer.npz -n 4 --steps 5") == 0
    for other in ("other.npz", "fewer.npz"):
        assert not np.array_equal(np.load(other)["arr_0"], images[:4])


def test_two_files_are_interpolated(drawing):
    draw, images = drawing
    pair = "--interpolate a.png b.png"
    assert draw(f"pixels.npz {pair} --lambda 0,0.5,1 --at 0") == 0
    assert draw(f"latents.npz {pair} --lambda 1 --at 20") == 0
    first, middle, second = np.load("pixels.npz")["arr_0"]
    assert np.array_equal(first, images[0]) and np.array_equal(second, images[1])
    assert np.abs(middle - images[:2].mean(axis=0)).max() <= 0.5
    assert not np.array_equal(np.load("latents.npz")["arr_0"][0], images[1])
    assert draw(f"row.png {pair} -n 2 --steps 10") == 0
    row = read("row.png")
    assert row.shape == (2 * 66, 13 * 66, 3) and np.array_equal(row[1:65:8, -65:-1:8, 0], images[1, :, :, 0])


FAULTS = [
    ("x.jpg", 2, ".png, .gif or .npz"), (".", 1, "not an empty folder"), ("x.png y.png", 2, "one output"),
    ("x.png --label 3", 2, "takes no labels"), ("x.png --label 0.5,0.5", 2, "takes no labels"),
    ("x.png --steps 21", 2, "1..20"), ("x.png --at 3", 2, "belong to --interpolate"),
    ("x.gif --interpolate a.png b.png", 2, "end the name in .png"),
    ("x.png --interpolate a.png b.png --at 21", 2, "0..20"),
    ("x.png --interpolate a.png b.png --lambda 2", 2, "lambda must lie in"),
    ("x.png --interpolate a.png b.png --lambda nan", 2, "lambda must lie in"),
    ("x.png --interpolate a.png pipe.png", 1, "pipe.png: it is no file"),
    ("x.png --interpolate a.png wide.png", 1, "wide.png has 9x8 pixels"),
    ("x.png --interpolate a.png text.png", 1, "text.png is no image"),
    ("x.png --interpolate a.png gone.png", 1, "gone.png"), ("x.png --label three", 2, "--label three"),
]  # fmt: skip


def test_what_cannot_be_drawn_is_named_and_nothing_is_written(drawing, tmp_path, capsys):
    Image.new("L", (9, 8)).save("wide.png")
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo("pipe.png")
    before = sorted(tmp_path.rglob("*"))
    for words, code, fault in FAULTS:
        assert drawing[0](words) == code, words
        error = capsys.readouterr().err.strip()
        assert fault in error and error.count("\n") == 0, words
        assert sorted(tmp_path.rglob("*")) == before, words


def test_a_network_that_has_diverged_draws_nothing(tiny_run, tmp_path, capsys):
    write_record(tiny_run, ())
    with_weights(tiny_run, float("nan"))
    assert main(["draw", str(tiny_run.path), f"{tmp_path / 'x.png'}", "-n", "1"]) == 1
    assert "have diverged" in capsys.readouterr().err and not list(tmp_path.iterdir())

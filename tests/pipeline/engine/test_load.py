"""`pipeline.load` and `ddpm draw`: what a run or a folder gives draws what the run itself draws."""

import dataclasses
import json
import os
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_experiment
from PIL import Image
from staged import change, with_weights

import pipeline
from ddpm import NO_LABEL, build_model, to_uint8
from ddpm.networks.config import ExactConfig
from pipeline.cli.program import main
from pipeline.engine.find import make_place
from pipeline.engine.provenance import write_record
from pipeline.errors import PipelineError
from pipeline.store import checkpoint, tars
from pipeline.store.diffusers_layout import export_to_diffusers

CLASSES = tiny_experiment(
    "model.name=context_unet", "model.norm=group", "model.channel_mult=[1,2]", "data.labels=10", "sample.label=cycle"
)  # fmt: skip
EXACT = dataclasses.replace(tiny_experiment("data.limit=3"), model=ExactConfig())
SHAPE = (1, 8, 8)


def build(experiment, change=lambda name, tensor: tensor):
    """The model of an untrained network, as another process builds it from JSON."""
    tensors = checkpoint.create_network(experiment).state_dict()
    settings = json.loads(json.dumps(checkpoint.describe_model(experiment)))
    return build_model(settings, {name: change(name, tensor) for name, tensor in tensors.items()})


def test_a_run_and_its_export_draw_the_samples_of_the_run(sampled, tmp_path):
    write_record(sampled, ())
    stored, _ = tars.load_images(sampled.samples, "samples")
    export_to_diffusers(sampled, tmp_path / "out", "ema", None)
    for name, options in ((sampled.name[:-3], {}), (tmp_path / "out", {"seed": sampled.experiment.seed})):
        model = pipeline.load(name, storage=sampled.storage)
        assert torch.equal(to_uint8(model.sample(12, batch_size=6, **options)), torch.from_numpy(stored))
    assert "Model(out: FastUNet of 44,969 parameters, Diffusion(20 of 20 steps, linear betas" in repr(model)


def test_the_newest_checkpoint_stands_in_for_one_that_is_not_there_yet(tiny_run):
    longer = change(tiny_run, "train", steps=100)
    write_record(longer, ())
    with pytest.raises(PipelineError, match="no checkpoint yet"):
        pipeline.load(tiny_run.path)
    with_weights(tiny_run)
    for which in ("last", "best"):
        changed = change(change(longer, "sample", checkpoint=which), "evaluate", checkpoints="every:2")
        write_record(changed, ())
        assert f"ema weights of step 6 of {tiny_run.name}" in repr(pipeline.load(tiny_run.path))


def test_a_model_is_built_from_json_and_tensors_and_labels_and_vectors_ask_for_classes():
    torch.manual_seed(0)
    model = build(CLASSES, lambda name, x: torch.randn_like(x) / 9 + ("norm" in name))
    three, none = torch.eye(10)[3].tolist(), [0.0] * 10
    equal = [
        ({"label": 3}, {"label": three}), ({"label": NO_LABEL}, {"label": none}), ({}, {"label": torch.arange(3)}),
        ({"label": 3, "guidance_scale": 2.0}, {"label": three, "guidance_scale": 2.0}),
    ]  # fmt: skip
    drawn = [model.sample(3, batch_size=2, **one) for one, _ in equal]
    for images, (_, other) in zip(drawn, equal, strict=True):
        torch.testing.assert_close(images, model.sample(3, **other), rtol=0, atol=1e-4)
    assert all((a - b).abs().max() > 1e-3 for a, b in combinations(drawn, 2))
    assert "10 classes" in repr(model) and build(EXACT).sample(2, steps=2).shape == (2, *SHAPE)
    with pytest.raises(ValueError, match="of another network"):
        build_model(checkpoint.describe_model(CLASSES), {"extra": torch.zeros(1)})
    faults = ((model, 10, "0 to 9"), (model, [0.5], "10 numb"), (build(EXACT), 1, "no labels"))
    for faulty, label, fault in faults:
        with pytest.raises(ValueError, match=fault):
            faulty.sample(1, label=label)


@pytest.mark.parametrize(
    ("at", "steps", "visited"), [(10, 10, [9, 7, 4, 2, 0]), (3, None, [2, 1, 0]), (20, 1, [19]), (0, 4, [])]
)
def test_an_interpolation_begins_at_its_t_and_takes_its_share_of_the_steps(at, steps, visited):
    model, seen = build(tiny_experiment()), []
    model.net.register_forward_pre_hook(lambda net, arguments: seen.append(arguments[1].tolist()))
    images = model.interpolate(torch.zeros(SHAPE), torch.ones(SHAPE), [0, 1], at, steps=steps)
    assert images.shape == (2, *SHAPE) and seen == [[t, t] for t in visited]
    with pytest.raises(ValueError, match="images of shape"):
        model.interpolate(torch.zeros(SHAPE), torch.ones(1, 8, 9))


def test_the_notebook_runs_where_a_run_of_the_digits_lies(tmp_path, monkeypatch):
    """It is kept without outputs, and any front end opens it; here its cells run one after the other."""
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    run = make_place(tiny_experiment("name=digits"), tmp_path / "runs")
    write_record(run, ())
    with_weights(run)
    monkeypatch.chdir(tmp_path)
    names = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert 0 < names["bound"].total.item() < 100 and names["rows"][0].shape == (9, *SHAPE)
    assert not any(cell["outputs"] for cell in cells) and notebook["nbformat"] == 4


@pytest.fixture
def drawing(sampled, tmp_path, monkeypatch):
    """`ddpm draw` of a tiny run in an empty folder that holds its first two samples as files."""
    write_record(run := sampled, ())
    monkeypatch.chdir(tmp_path)
    images, _ = tars.load_images(run.samples, "samples")
    for name, image in zip("ab", images[:2, 0], strict=True):
        Image.fromarray(image).save(f"{name}.png")
    where = f"cluster.storage={run.storage}"
    return lambda words: main(["draw", run.name, *words.split(), where]), images.transpose(0, 2, 3, 1)


def read(file):
    return np.asarray(Image.open(file))


def test_each_ending_holds_the_first_samples_of_the_run_or_what_lies_between_two_files(drawing, capsys):
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


def test_what_cannot_be_drawn_is_named_and_nothing_is_written(drawing, tmp_path, capsys):
    Image.new("L", (9, 8)).save("wide.png")
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo("pipe.png")
    before, mix = sorted(tmp_path.rglob("*")), "x.png --interpolate a.png"
    for words, code, fault in (
        ("x.jpg", 2, ".png, .gif or .npz"), (".", 1, "not an empty folder"), ("x.png y.png", 2, "one output"),
        ("x.png --label 3", 2, "takes no labels"), ("x.png --label 0.5,0.5", 2, "takes no labels"),
        ("x.png --label three", 2, "--label three"), ("x.png --steps 21", 2, "1..20"),
        ("x.png --at 3", 2, "belong to --interpolate"), (f"{mix} b.png --at 21", 2, "0..20"),
        ("x.gif --interpolate a.png b.png", 2, "end the name in .png"),
        (f"{mix} b.png --lambda 2", 2, "lambda must"), (f"{mix} b.png --lambda nan", 2, "lambda must"),
        (f"{mix} pipe.png", 1, "pipe.png: it is no file"), (f"{mix} gone.png", 1, "gone.png"),
        (f"{mix} wide.png", 1, "wide.png has 9x8 pixels"), (f"{mix} text.png", 1, "text.png is no image"),
    ):  # fmt: skip
        assert drawing[0](words) == code, words
        error = capsys.readouterr().err.strip()
        assert fault in error and error.count("\n") == 0, words
        assert sorted(tmp_path.rglob("*")) == before, words

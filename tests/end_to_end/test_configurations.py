"""Every configuration in conf/: `ddpm show`, and two steps of its own objective on images of its own size."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_cpu, read_losses
from image_files import write_set
from staged import results, run_stage

from pipeline import config
from pipeline.cli.program import main
from pipeline.engine.find import make_place
from pipeline.scores import efficientnet
from pipeline.stages import evaluate, sample, shard, train
from pipeline.store import tars

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf").glob("*.yaml"))
TRAIN_IMAGES, TEST_IMAGES = 4, 2
# Like another one but for the images, the size of the network, which is thin here, or the length.
CIFAR10_ALIKE = {"cifar10_short", "cifar10_small", "cifar10_published"}
ALIKE = {"lsun_bedroom", "lsun_bedroom_large", "lsun_cat", *CIFAR10_ALIKE}
# A thin network of the same depth, and a short chain.
NARROW = {
    "unet": ["model.channels=4", "model.norm_groups=2"],
    "context_unet": ["model.channels=8", "model.norm_groups=4"],
    "mha_unet": ["model.channels=8", "model.time_width=8", "model.num_heads=1"],
    "annotated_unet": ["model.channels_per_depth=[4,4,4,8]", "model.norm_groups=2"],
}
SHORT = [
    "published.weights=null", "diffusion.timesteps=3", "train.steps=2", "train.batch_size=2",
    "train.checkpoint_every=2", "train.sample_every=0", "train.log_every=1", "sample.num_images=2",
    "sample.steps=null", "sample.batch_size=2", "evaluate.metrics=[nll]", "evaluate.nll_images=1",
    "evaluate.nll_batch_size=1", "evaluate.nll_timesteps=null", "evaluate.checkpoints=null", "sample.checkpoint=last",
]  # fmt: skip


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("storage")


def write_images(name: str, storage: Path) -> list[str]:
    """The overrides by which a configuration reads images that were made for it."""
    data = config.load_experiment(name, []).data
    if data.source == "digits":
        return []
    place = storage / f"{data.source}-{data.image_size}"
    if not place.exists():
        shape = (TRAIN_IMAGES + TEST_IMAGES, data.image_size, data.image_size, data.channels)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        write_set(data.source, place, images.squeeze(), np.arange(len(images)) % max(data.labels, 1))
    return [f"data.path={place}", f"data.test_images={TEST_IMAGES}"]


def test_show_without_images_says_what_is_missing(storage, capsys):
    assert main(["show", "lsun_church", f"cluster.storage={storage}"]) == 0
    assert "# keys: not known" in capsys.readouterr().out


SLOW = [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in EXPERIMENTS]


@pytest.mark.parametrize("name", SLOW)
def test_two_steps(name, storage):
    data = write_images(name, storage)
    whole = config.load_experiment(name, data)
    experiment = config.load_experiment(name, [*data, *SHORT, *NARROW[whole.model.name]])
    run = make_place(experiment, storage)
    run.path.mkdir(parents=True)
    run_stage(shard, run)
    train.STAGE.run_worker(one_cpu().context, run)
    run_stage(sample, run)
    assert np.isfinite(read_losses(run.path)).all() and len(read_losses(run.path)) == 2
    images, _ = tars.load_images(run.samples, "samples")
    size = experiment.data.image_size
    assert images.shape == (2, experiment.data.channels, size, size)
    if "nll" in whole.evaluate.metrics:
        run_stage(evaluate, run)
        assert np.isfinite(results(run)["scores"]["nll_bpd"])


def test_missing_features_are_named_before_anything_starts(storage, monkeypatch, capsys):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    assert main(["run", "folder", *write_images("folder", storage), f"cluster.storage={storage}/none"]) == 1
    assert "efficientnet-lite0 needs the package" in capsys.readouterr().err
    assert not list(storage.glob("none/folder-*")) and not list(storage.glob("none/data/*/*.tar"))

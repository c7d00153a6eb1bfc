"""Sharding 60,000 images; reading them for training, compared with webdataset's loader and with what training uses."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import subjects
from benchmarks.harness import OURS, Contender, Outcome, Row, Settings, race
from benchmarks.subjects import Way
from benchmarks.workspace import workspace
from pipeline.compute.units import create_local_worker
from pipeline.stages import shard
from pipeline.stages.train import list_image_indices, slice_batch
from pipeline.store import tars
from pipeline.store.run import Place

BATCH = 128


def run(settings: Settings) -> Outcome:
    outcome = Outcome()
    with workspace(settings) as place:
        experiment = place.experiment()
        run = place.run_of(experiment)
        seconds = _shard(experiment, run)
        count = tars.open_shards(run.data).count_images("train")
        outcome.rows.append(Row(f"shard {place.images}", f"{OURS}, one process", seconds, "s"))
        warm, load_seconds = _loaded(run)
        outcome.rows.append(Row("read a split, verify, decode", OURS, count / load_seconds, "images/s"))
        found = [
            Contender(f"{OURS}: batches from memory", warm, BATCH),
            Contender("webdataset: its loader", _webdataset(run), BATCH),
        ]
        outcome.rows += race(f"loading, batch {BATCH}", found, settings, "images/s", found[0].name)
        outcome.rows += _eaten(settings, found[0].name)
    return outcome


def _shard(experiment: Any, run: Place) -> float:
    """Seconds of all work units, one after the other, and the manifest."""
    began, context = time.perf_counter(), create_local_worker(1)
    for units in shard.STAGE.work(run.replace_experiment(experiment)):
        for unit in units:
            unit.body(context, *unit.args)
    return time.perf_counter() - began


def _loaded(run: Place) -> tuple[Callable[[], Any], float]:
    """A function that gives the next shuffled batch, and the seconds that the first one waits for."""
    began = time.perf_counter()
    images = torch.from_numpy(tars.load_images(run.data, "train")[0])
    seconds = time.perf_counter() - began
    rows, step = slice_batch(BATCH, 0, 1), 0

    def batch() -> torch.Tensor:
        nonlocal step
        step += 1
        return images[list_image_indices(0, len(images), step, BATCH, rows)]

    return batch, seconds


def _webdataset(run: Place) -> Callable[[], Any]:
    """Shards from disk (its cache is warm), decoded and shuffled in this process."""
    import webdataset

    names = [str(shard.path) for shard in tars.open_shards(run.data).list_shards("train")]
    dataset = webdataset.WebDataset(names, shardshuffle=len(names), seed=0, empty_check=False)
    stream = iter(dataset.shuffle(1000).decode("torchrgb8").to_tuple("png", "cls").batched(BATCH).repeat())
    return lambda: next(stream)


def _eaten(settings: Settings, against: str) -> list[Row]:
    batch = 4 if settings.quick else 16
    way = Way("bf16")
    step = Contender("training step, bf16", subjects.our_train_step(settings, way, batch), batch)
    return race("what training uses", [step], settings, "images/s", against)

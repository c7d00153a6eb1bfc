"""The shard stage: raw images -> verified webdataset tars, one work unit for each tar.

Beside `train-00000.tar` stands `train-00000.json` with its range of images, count, bytes and sha256, written
after it: a tar that lacks it, or differs from it, is made again.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.compute.work import Kind, Unit, WorkerContext
from pipeline.config import DataConfig, Experiment
from pipeline.data.sources import fingerprint, locate, open_source, refuse
from pipeline.errors import PipelineError
from pipeline.store.files import check_file, read_json, read_manifest, write_json
from pipeline.store.run import Place
from pipeline.store.tars import write_index, write_shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Images [start, stop) of a split, in the tar `name`."""

    name: str
    split: str
    start: int
    stop: int


def is_done(experiment: Experiment, run: Place) -> bool:
    try:
        return read_manifest(run.data, check="size") is not None
    except PipelineError as error:
        log.warning("%s; its shard is made again", error)
        return False


def work(experiment: Experiment, run: Place) -> Iterator[list[Unit]]:
    """Yields the shards that are missing, then seals the folder with the manifest."""
    shared = run.storage / "data"
    data = locate(experiment.data, shared / "downloads")
    shards = plan(open_source(data).splits, data.images_per_shard)
    yield [
        Unit(Kind.SHARD, write, (data, run.data, shard), f"shard {shard.name}", shard.stop - shard.start)
        for shard in shards
        if finished(run.data, shard) is None
    ]
    facts = [_finished_or_raise(run.data, shard) for shard in shards]
    skipped = [entry for shard in facts for entry in shard["skipped"]]
    _report_skipped(skipped, data.max_undecodable)
    write_index(
        run.data,
        _by_split(facts),
        source=data.source,
        fingerprint=fingerprint(experiment.data, shared / "fingerprints.json"),
        image_size=data.image_size,
        channels=data.channels,
        labels=data.labels,
        skipped=len(skipped),
    )


def plan(splits: dict[str, int], images_per_shard: int) -> list[Shard]:
    """The tars that hold splits of these sizes."""
    return [
        Shard(f"{split}-{number:05d}.tar", split, start, min(start + images_per_shard, count))
        for split, count in splits.items()
        for number, start in enumerate(range(0, count, images_per_shard))
    ]


def _by_split(shards: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    splits: dict[str, list[dict[str, Any]]] = {}
    for shard in shards:
        splits.setdefault(shard["split"], []).append(shard)
    for split, of_split in splits.items():
        if not any(shard["count"] for shard in of_split):
            raise PipelineError(f"no image of the {split} split decodes; check data.path")
    return splits


def write(ctx: WorkerContext, data: DataConfig, directory: Path, shard: Shard) -> None:
    """The work unit: one tar, then its facts."""
    skipped: list[list[str]] = []

    def undecodable(name: str, reason: str) -> None:
        skipped.append([name, reason])
        if len(skipped) > data.max_undecodable:
            refuse(name, reason)

    records = open_source(data).read(shard.split, shard.start, shard.stop, undecodable)
    facts = write_shard(directory / shard.name, records)
    write_json(_facts_file(directory, shard), {**asdict(shard), **facts, "skipped": skipped})


def finished(directory: Path, shard: Shard) -> dict[str, Any] | None:
    """The facts of a shard that is on disk, whole and of this very range; None where it has to be made."""
    file = _facts_file(directory, shard)
    if not file.exists():
        return None
    try:
        facts = read_json(file)
        check_file(directory / shard.name, facts, "sha256")
    except PipelineError:
        return None
    return facts if asdict(shard).items() <= facts.items() else None


def _finished_or_raise(directory: Path, shard: Shard) -> dict[str, Any]:
    facts = finished(directory, shard)
    if facts is None:
        raise PipelineError(f"{directory / shard.name} changed under our hands; run the command again")
    return facts


def _facts_file(directory: Path, shard: Shard) -> Path:
    return (directory / shard.name).with_suffix(".json")


def _report_skipped(skipped: list[list[str]], allowed: int) -> None:
    if len(skipped) > allowed:
        name, reason = skipped[allowed]
        refuse(f"{name}, one of {len(skipped)} broken images where data.max_undecodable={allowed},", reason)
    for name, reason in skipped:
        log.warning("%s does not decode (%s) and is left out", name, reason)

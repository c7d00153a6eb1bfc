"""The shard stage: writes the images of a source as shards (webdataset tars), one unit for each shard."""

import logging
from collections.abc import Iterator
from pathlib import Path

from pipeline.compute.units import Unit, UnitKind, Worker
from pipeline.config import DataConfig
from pipeline.console import print_line
from pipeline.data.sources import compute_fingerprint, download_source, open_source
from pipeline.data.sources.base import ImageSource, Locations, raise_undecodable
from pipeline.data.sources.cifar10 import is_official
from pipeline.errors import PipelineError, escape_name
from pipeline.stages.stage import Stage
from pipeline.store.files import try_read
from pipeline.store.run import Place, locate_fingerprints
from pipeline.store.tars import LABEL, Shard, ShardFacts, read_shard_manifest, write_shard_manifest

log = logging.getLogger(__name__)


class ShardStage(Stage):
    """Writes the images of a source as shards, sealed by a manifest."""

    name = "shard"

    def is_done(self, place: Place) -> bool:
        return try_read(read_shard_manifest, place.data) is not None

    def find_shared_folder(self, place: Place) -> Path:
        return place.data

    def work(self, place: Place) -> Iterator[list[Unit]]:
        """Yield the units of missing shards, then check the skipped images and write the manifest.

        Its fact `official` is true for the pixels of CIFAR-10, false for others that claim to be, else null.
        """
        config = place.experiment.data
        data = download_source(config, place.downloads)
        source, size = open_source(data), data.images_per_shard
        shards = [
            Shard(place.data, f"{split}-{number:05d}.tar", split, start, min(start + size, count))
            for split, count in source.splits.items()
            for number, start in enumerate(range(0, count, size))
        ]
        missing = [shard for shard in shards if shard.read_facts() is None]
        found = (source.locate_range(shard.split, shard.start, shard.stop) for shard in missing)
        yield [
            Unit(UnitKind.SHARD, write_shard, (data, shard, locations), f"shard {shard.name}", shard.count)
            for shard, locations in zip(missing, found, strict=True)
        ]
        splits: dict[str, list[ShardFacts]] = {}
        for shard in shards:
            splits.setdefault(shard.split, []).append(shard.require_facts())
        skipped = [image for each in splits.values() for facts in each for image in facts.get("skipped", [])]
        if len(skipped) > data.max_undecodable:
            name, reason = skipped[data.max_undecodable]
            limit = f"one of {len(skipped)} broken images where data.max_undecodable={data.max_undecodable}"
            raise_undecodable(f"{name}, {limit},", reason)
        for name, reason in skipped:
            log.warning("%s does not decode (%s) and is left out", name, reason)
        for split, facts in splits.items():
            if not any(shard["count"] for shard in facts):
                raise PipelineError(f"no image of the {split} split decodes; check data.path")
        _describe_source(source, splits)
        official = is_official(place.data, splits) or (False if data.source == "cifar10" else None)
        if official is False:
            log.warning("%s holds other images than CIFAR-10: no score compares with the paper's", data.path)
        write_shard_manifest(
            place.data, splits, source=data.source,
            fingerprint=compute_fingerprint(config, locate_fingerprints(place.storage)),
            image_size=data.image_size, channels=data.channels, labels=data.labels, skipped=len(skipped),
            official=official,
        )  # fmt: skip


STAGE = ShardStage()


def _describe_source(source: ImageSource, splits: dict[str, list[ShardFacts]]) -> None:
    """Describe the source: the sizes of its splits, its classes, guesses and skipped files."""
    labels, names = source.data.labels, list(source.classes)
    shuffled = (f"{split} lies class by class; its order is shuffled" for split in source.shuffled_splits)
    notes = [*source.notes, *shuffled]
    if source.skipped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(source.skipped.items()))
        notes.append(f"skipped in {source.root}: {kinds}")
    there = {place[LABEL] for shard in splits["train"] for place in shard["places"]}
    if missing := ", ".join(str(label) for label in range(labels) if label not in there):
        notes.append(f"data.labels={labels}, but no training image has the class {missing[:60]}; change it")
    for note in notes:
        log.warning("%s", escape_name(note))
    sizes = ", ".join(f"{name} {sum(s['count'] for s in facts):,} images" for name, facts in splits.items())
    names[20:] = [f"and {len(names) - 20:,} more"] if len(names) > 20 else []
    print_line(escape_name(f"shard: {sizes}" + (f"; classes {', '.join(names)}" if names else "")))


def write_shard(ctx: Worker, data: DataConfig, shard: Shard, locations: Locations) -> None:
    """Write the images of one shard, which have these locations, then its facts (body of a unit)."""
    skipped: list[list[str]] = []

    def skip_image(name: str, reason: str) -> None:
        skipped.append([name, reason])
        if len(skipped) > data.max_undecodable:
            raise_undecodable(name, reason)

    records = open_source(data).read_records(shard.split, shard.start, shard.stop, skip_image, locations)
    shard.write(records, skipped=skipped)

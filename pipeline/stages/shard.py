"""The shard stage: raw images -> verified webdataset tars, one work unit for each tar."""

import logging
from collections.abc import Iterator
from pathlib import Path

from pipeline.compute.units import Unit, UnitKind, Worker
from pipeline.config import DataConfig
from pipeline.data.sources import compute_fingerprint, download_source, open_source, raise_undecodable
from pipeline.errors import PipelineError
from pipeline.stages.stage import Stage
from pipeline.store.files import read_manifest_or_none
from pipeline.store.run import Place, locate_downloads, locate_fingerprints
from pipeline.store.tars import Shard, ShardFacts, write_shard_manifest

log = logging.getLogger(__name__)


class ShardStage(Stage):
    """Writes the images of a source as tars, sealed by a manifest."""

    name = "shard"

    def is_done(self, place: Place) -> bool:
        return read_manifest_or_none(place.data) is not None

    def find_shared_folder(self, place: Place) -> Path:
        return place.data

    def work(self, place: Place) -> Iterator[list[Unit]]:
        """Yield the shards that are missing, then seal the folder."""
        config = place.experiment.data
        data = download_source(config, locate_downloads(place.storage))
        shards = plan_shards(place.data, open_source(data).splits, data.images_per_shard)
        yield [
            Unit(UnitKind.SHARD, write_shard, (data, shard), f"shard {shard.name}", shard.stop - shard.start)
            for shard in shards
            if shard.read_facts() is None
        ]
        facts = [shard.require_facts() for shard in shards]
        skipped = [entry for shard in facts for entry in shard.get("skipped", [])]
        _report_skipped(skipped, data.max_undecodable)
        write_shard_manifest(
            place.data,
            _group_by_split(facts),
            source=data.source,
            fingerprint=compute_fingerprint(config, locate_fingerprints(place.storage)),
            image_size=data.image_size,
            channels=data.channels,
            labels=data.labels,
            skipped=len(skipped),
        )


STAGE = ShardStage()


def plan_shards(folder: Path, splits: dict[str, int], images_per_shard: int) -> list[Shard]:
    """List the tars that hold splits of these sizes."""
    return [
        Shard(folder, f"{split}-{number:05d}.tar", split, start, min(start + images_per_shard, count))
        for split, count in splits.items()
        for number, start in enumerate(range(0, count, images_per_shard))
    ]


def write_shard(ctx: Worker, data: DataConfig, shard: Shard) -> None:
    """Do the work unit: one tar, then its facts."""
    skipped: list[list[str]] = []

    def pass_over(name: str, reason: str) -> None:
        skipped.append([name, reason])
        if len(skipped) > data.max_undecodable:
            raise_undecodable(name, reason)

    records = open_source(data).read_records(shard.split, shard.start, shard.stop, pass_over)
    shard.write(records, skipped=skipped)


def _group_by_split(shards: list[ShardFacts]) -> dict[str, list[ShardFacts]]:
    groups = {shard["split"]: [s for s in shards if s["split"] == shard["split"]] for shard in shards}
    for split, group in groups.items():
        if not any(shard["count"] for shard in group):
            raise PipelineError(f"no image of the {split} split decodes; check data.path")
    return groups


def _report_skipped(skipped: list[list[str]], allowed: int) -> None:
    if len(skipped) > allowed:
        name, reason = skipped[allowed]
        raise_undecodable(
            f"{name}, one of {len(skipped)} broken images where data.max_undecodable={allowed},", reason
        )
    for name, reason in skipped:
        log.warning("%s does not decode (%s) and is left out", name, reason)

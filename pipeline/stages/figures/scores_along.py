"""IS and FID of the estimates of x_0 along the reverse process (Fig. 10)."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.images import to_uint8
from pipeline.compute.work import Kind, Unit, WorkerContext
from pipeline.config import Experiment
from pipeline.drawing import charts
from pipeline.errors import PipelineError
from pipeline.scores.preparations import extractor_of
from pipeline.scores.reference import Reference
from pipeline.stages.figures.chains import chain_of, estimates, shown_steps
from pipeline.stages.figures.figure import Figure, Unavailable, in_words, unit_folder
from pipeline.store.files import read_arrays, write_arrays
from pipeline.store.run import Place

if TYPE_CHECKING:  # as in the evaluate stage: seconds that a command with nothing to do need not spend
    from pipeline.scores.extractors import Extractor

PER_ROW = 16  # images scored for each row that the other figures have
UNIT_IMAGES = 16


def scored_extractor(experiment: Experiment, run: Place) -> "Extractor":
    """The extractor that the run was scored with. Raises Unavailable where no FID was."""
    if "fid" not in experiment.evaluate.metrics:
        raise Unavailable("it needs features, which are made where evaluate.metrics holds fid")
    if not (run.of(experiment).scores_manifest).exists():
        raise Unavailable(f"it needs features, which `ddpm evaluate {experiment.name}` makes")
    try:
        return extractor_of(experiment, run)
    except (PipelineError, OSError) as error:
        raise Unavailable(f"its feature extractor is not there: {error}") from error


def scores_along(experiment: Experiment, run: Place) -> Figure:
    extractor = scored_extractor(experiment, run)
    reference = Reference.of(run, extractor, experiment.evaluate.reference)
    n = min(PER_ROW * experiment.figures.images, experiment.sample.num_images)
    if n < 2 or reference.load() is None:
        raise Unavailable("it needs two samples" if n < 2 else "the reference's statistics are not there")
    folder, units = unit_folder(experiment, run, "along", extractor.name), {}
    for start in range(0, n, UNIT_IMAGES):
        stop = min(start + UNIT_IMAGES, n)
        file = folder / f"{start:06d}-{stop:06d}.npz"
        args = (extractor, experiment, run, start, stop, file)
        name = f"scores along samples {start}-{stop - 1}"
        units[file] = Unit(Kind.FIGURE, keep_features, args, name, stop - start, needs_gpu=True)
    few = ", too few for a score that stands by itself" if n < 10_000 else ""
    caption = (
        f"Scores of the estimate of x_0 along the reverse process, of {n:,} images{few}, by the features of "
        f"`{extractor.name}` (paper, Fig. 10; {in_words(experiment)})"
    )
    steps = shown_steps(len(chain_of(experiment)))
    return Figure("scores_along.svg", caption, units, partial(_draw, steps, n, reference))


def keep_features(
    ctx: WorkerContext, extractor: "Extractor", experiment: Experiment, run: Place, start: int, stop: int, file: Path
) -> None:  # fmt: skip
    """The work unit: features (stages, n, d) and logits of the estimates of samples [start, stop)."""
    from pipeline.scores.extractors import extract

    stages = to_uint8(estimates(ctx, experiment, run, start, stop)).numpy()
    features, logits = extract(extractor, stages.reshape(-1, *stages.shape[2:]), ctx.device)
    shape = stages.shape[:2]
    write_arrays(file, features=features.reshape(*shape, -1), logits=logits.reshape(*shape, logits.shape[1]))


def score_stages(files: list[Path], n: int, reference: Reference) -> list[dict[str, float]]:
    """fid, and is_mean where there are classes, of each stage."""
    from pipeline.scores.distances import frechet_distance, score

    found, statistics = [], reference.load()
    assert statistics is not None
    loaded = [read_arrays(file) for file in files]
    for stage in range(len(loaded[0]["features"])):
        scored = score(((part["features"][stage], part["logits"][stage]) for part in loaded), n)
        scores = {"fid": frechet_distance(scored.moments.statistics(), statistics)}
        found.append(scores | ({"is_mean": scored.sums.inception_score()[0]} if scored.sums else {}))
    return found


def _draw(steps: list[int], n: int, reference: Reference, files: list[Path], file: Path) -> None:
    stages = score_stages(files, n, reference)
    names = {"is_mean": "IS", "fid": "FID"}
    panels = [
        charts.curves(title, "reverse steps", [charts.Line(steps, [scores[key] for scores in stages])])
        for key, title in names.items()
        if key in stages[0]
    ]
    charts.save(panels, file)

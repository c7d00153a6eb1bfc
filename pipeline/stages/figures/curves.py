"""The figures that are curves: rate and distortion (Fig. 5), scores along the reverse process (Fig. 10)."""

from pathlib import Path

from ddpm.images import to_uint8
from pipeline.compute.units import UnitKind, Worker, split_units
from pipeline.drawing import charts
from pipeline.errors import PipelineError
from pipeline.scores.distances import Statistics, frechet_distance, sum_features
from pipeline.scores.extractors import Extractor, extract, find_extractor
from pipeline.scores.metrics import METRICS
from pipeline.scores.reference import Reference
from pipeline.scores.results import Scores
from pipeline.stages.figures.chains import choose_stages, estimate
from pipeline.stages.figures.figure import Figure, Unavailable, describe_chain, unit_folder
from pipeline.store.chain import build_diffusion
from pipeline.store.files import read_arrays, read_json, write_arrays
from pipeline.store.run import Place

PER_ROW = 16  # images scored for each row that the other figures have
UNIT_IMAGES = 16


def rate_distortion(place: Place) -> Figure:
    """Plan Fig. 5, from the evaluation's bound."""
    nll = place.nll_json
    if "nll" not in place.experiment.evaluate.metrics or not nll.exists():
        raise Unavailable(
            f"it needs the bound: `ddpm evaluate {place.experiment.name}` with nll among evaluate.metrics makes it"
        )
    caption = (
        f"Progressive lossy compression of {read_json(nll)['n']:,} test images: rate, and error of the estimate "
        "of x_0 on the scale 0 to 255 (paper, Fig. 5)"
    )

    def draw(files: list[Path], file: Path) -> None:
        charts.save_panels(charts.plot_rate_distortion(read_json(nll)["rate_distortion"]), file)

    return Figure("rate_distortion.svg", caption, {}, draw)


def find_scoring_extractor(place: Place) -> Extractor:
    """Find the extractor that the run was scored with. Raises Unavailable where no FID was."""
    if "fid" not in place.experiment.evaluate.metrics:
        raise Unavailable("it needs features, which are made where evaluate.metrics holds fid")
    if not place.scores_manifest.exists():
        raise Unavailable(f"it needs features, which `ddpm evaluate {place.experiment.name}` makes")
    try:
        return find_extractor(place)
    except (PipelineError, OSError) as error:
        raise Unavailable(f"its feature extractor is not there: {error}") from error


def scores_along(place: Place) -> Figure:
    """Plan Fig. 10: IS and FID of the estimates of x_0."""
    experiment, extractor = place.experiment, find_scoring_extractor(place)
    statistics = Reference.of(place, extractor, experiment.evaluate.reference).load()
    n = min(PER_ROW * experiment.figures.images, experiment.sample.num_images)
    if n < 2 or statistics is None:
        raise Unavailable("it needs two samples" if n < 2 else "the reference's statistics are not there")
    folder, args = unit_folder(place, "along", extractor.name), (extractor, place)
    units = split_units(UnitKind.FIGURE, keep_features, args, n, UNIT_IMAGES, folder, "scores along samples")
    few = ", too few for a score that stands by itself" if n < 10_000 else ""
    caption = (
        f"Scores of the estimate of x_0 along the reverse process, of {n:,} images{few}, by the features of "
        f"`{extractor.name}` (paper, Fig. 10; {describe_chain(experiment)})"
    )
    steps = choose_stages(len(build_diffusion(experiment)))

    def draw(files: list[Path], file: Path) -> None:
        stages = score_stages(files, n, statistics)
        lines = {
            name: [scores[name] for scores in stages] for name in ("is_mean", "fid") if name in stages[0]
        }
        panels = [
            charts.plot_curves(METRICS[name].heading, "reverse steps", [charts.Line(steps, values)])
            for name, values in lines.items()
        ]
        charts.save_panels(panels, file)

    return Figure("scores_along.svg", caption, units, draw)


def keep_features(ctx: Worker, extractor: Extractor, place: Place, start: int, stop: int, file: Path) -> None:
    """Do the work unit: features (stages, n, d) and logits of the estimates of samples [start, stop)."""
    stages = to_uint8(estimate(ctx, place, start, stop)).numpy()
    features, logits = extract(extractor, stages.reshape(-1, *stages.shape[2:]), ctx.device)
    shape = stages.shape[:2]
    write_arrays(file, features=features.reshape(*shape, -1), logits=logits.reshape(*shape, logits.shape[1]))


def score_stages(files: list[Path], n: int, statistics: Statistics) -> list[Scores]:
    """Compute fid, and is_mean where there are classes, of each stage."""
    found: list[Scores] = []
    loaded = [read_arrays(file) for file in files]
    for stage in range(len(loaded[0]["features"])):
        scored = sum_features(((part["features"][stage], part["logits"][stage]) for part in loaded), n)
        scores = {"fid": frechet_distance(scored.moments.statistics(), statistics)}
        found.append(scores | ({"is_mean": scored.sums.inception_score()[0]} if scored.sums else {}))
    return found

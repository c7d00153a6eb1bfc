"""The figures with curves: rate and distortion (Fig. 5), scores along the reverse process (Fig. 10)."""

from pathlib import Path

from pipeline.compute.units import UnitKind, Worker, make_image_units
from pipeline.drawing import charts
from pipeline.errors import PipelineError
from pipeline.scores.distances import Statistics, compute_fid, sum_features
from pipeline.scores.extractors import Extractor, extract_features, find_extractor
from pipeline.scores.metrics import METRICS, Bound, Scores
from pipeline.scores.reference import load_reference
from pipeline.stages.figures import Figure, FigureUnavailable, describe_chain, locate_unit_folder
from pipeline.stages.figures.chains import count_chain_steps, list_snapshots, make_snapshots
from pipeline.store.arrays import read_arrays, write_arrays
from pipeline.store.files import read_sealed, try_read
from pipeline.store.run import Place

PER_ROW = 16  # images scored for each row that the other figures have
UNIT_IMAGES = 16


def plan_rate_distortion(place: Place) -> Figure:
    """Plan Fig. 5, from the evaluation's bound."""
    nll = place.nll_json
    asked = "nll" in place.experiment.evaluate.metrics and place.scores_manifest.exists()
    if (bound := try_read(read_sealed, nll, Bound) if asked else None) is None:
        raise FigureUnavailable(
            f"it needs the bound: `ddpm evaluate {place.experiment.name}` with nll among evaluate.metrics makes it"
        )
    if "rate_distortion" not in bound:
        raise FigureUnavailable("it needs all timesteps: evaluate.nll_timesteps=null")
    caption = (
        f"Progressive lossy compression of {bound['n']:,} {place.experiment.evaluate.nll_split} images: "
        "rate, and error of the estimate of x_0 on the scale 0 to 255 (paper, Fig. 5)"
    )

    def draw(files: list[Path], file: Path) -> None:
        charts.save_panels(charts.plot_rate_distortion(bound["rate_distortion"]), file)

    return Figure("rate_distortion.svg", caption, {}, draw)


def find_extractor_of_scores(place: Place) -> Extractor:
    """Find the extractor that the run was scored with. Raises FigureUnavailable if it has no FID."""
    if "fid" not in place.experiment.evaluate.metrics:
        raise FigureUnavailable("it needs features, which are made if evaluate.metrics holds fid")
    if not place.scores_manifest.exists():
        raise FigureUnavailable(f"it needs features, which `ddpm evaluate {place.experiment.name}` makes")
    try:
        return find_extractor(place)
    except (PipelineError, OSError) as error:
        raise FigureUnavailable(f"its feature extractor is not there: {error}") from error


def plan_scores_along_chain(place: Place) -> Figure:
    """Plan Fig. 10: IS and FID of the estimates of x_0."""
    experiment, extractor = place.experiment, find_extractor_of_scores(place)
    statistics = load_reference(place, extractor, experiment.evaluate.reference)
    n = min(PER_ROW * experiment.figures.images, experiment.sample.num_images)
    if n < 2 or statistics is None:
        raise FigureUnavailable("it needs two samples" if n < 2 else "it needs the reference's statistics")
    folder, args = locate_unit_folder(place, "along", extractor.name), (extractor, place)
    units = make_image_units(
        UnitKind.FIGURE, write_features, args, n, UNIT_IMAGES, folder, "scores along samples",
        count_chain_steps(1, experiment),
    )  # fmt: skip
    few = ", too few to compare with other scores" if n < 10_000 else ""
    caption = (
        f"Scores of the estimate of x_0 along the reverse process, of {n:,} images{few}, by the features of "
        f"`{extractor.name}` (paper, Fig. 10; {describe_chain(experiment)})"
    )

    def draw(files: list[Path], file: Path) -> None:
        steps = list_snapshots(experiment.sample.steps or experiment.diffusion.timesteps)
        scores = score_snapshots(files, n, statistics)
        panels = []
        for name in ("is_mean", "fid") if "is_mean" in scores[0] else ("fid",):
            line = charts.Line(steps, [row[name] for row in scores])
            panels.append(charts.Panel(METRICS[name].heading, "reverse steps", [line]))
        charts.save_panels(panels, file)

    return Figure("scores_along.svg", caption, units, draw)


def write_features(
    ctx: Worker, extractor: Extractor, place: Place, start: int, stop: int, file: Path
) -> None:
    """Write features (snapshots, n, d) and logits of the snapshots of samples [start, stop) (body of a unit)."""
    images = make_snapshots(ctx, place, start, stop).numpy()
    features, logits = extract_features(extractor, images.reshape(-1, *images.shape[2:]), ctx.device)
    shape = images.shape[:2]
    write_arrays(file, features=features.reshape(*shape, -1), logits=logits.reshape(*shape, logits.shape[1]))


def score_snapshots(files: list[Path], n: int, statistics: Statistics) -> list[Scores]:
    """Compute fid, and is_mean if there are classes, of each snapshot."""
    found: list[Scores] = []
    parts = [read_arrays(file) for file in files]
    for number in range(len(parts[0]["features"])):
        sums = sum_features(((part["features"][number], part["logits"][number]) for part in parts), n)
        found.append({"fid": compute_fid(sums.moments.to_statistics(), statistics)})
        if sums.in_order:
            found[-1]["is_mean"] = sums.in_order.compute_inception_score()[0]
    return found

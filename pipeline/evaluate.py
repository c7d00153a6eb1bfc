"""The evaluate stage: FID and IS of the samples, the NLL bound of the test split, each with its protocol.

A work unit is the features of one tar (`pipeline.fidelity.image_sets`), or the bound of one range of test
images. A unit's result is kept under all that it depends on, so asking for another metric repeats nothing.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from ddpm.likelihood import Likelihood, bits_per_dim, rate_distortion
from ddpm.rng import Stream, normal
from pipeline import tars
from pipeline.checkpoint import load_network
from pipeline.config import (
    Experiment,
    checkpoint_rule,
    checkpoint_step,
    evaluate_key,
    hash_of,
    sample_key,
    to_yaml,
    weights_kind,
)
from pipeline.errors import PipelineError
from pipeline.fidelity.image_sets import (
    ImageSet,
    Reference,
    Shard,
    baseline_set,
    content_of,
    shard_set,
    shards_of,
)
from pipeline.fidelity.preparations import extractor_of, pixels_file, preparations
from pipeline.rundir import (
    Run,
    read_arrays,
    read_manifest,
    write_arrays,
    write_json,
    write_manifest,
    write_text,
)
from pipeline.worker import Unit, WorkerContext

if TYPE_CHECKING:  # importing torch-fidelity takes seconds, and a command that is up to date needs none of it
    from pipeline.fidelity.extractors import Extractor
    from pipeline.fidelity.scores import Scored, Statistics

log = logging.getLogger(__name__)

METRICS, NLL, CONFIG = "metrics.json", "nll.json", "evaluate.yaml"
PAPER_SAMPLES = 50_000
NLL_CALL = (256, 2**18)  # images and pixels that one network call of the bound takes at most


def directory(experiment: Experiment, run: Run) -> Path:
    return run.evaluation(evaluate_key(experiment, run.run_key))


def is_done(experiment: Experiment, run: Run) -> bool:
    """Whether the scores are sealed, and are those of the samples that are there now."""
    try:
        manifest = read_manifest(directory(experiment, run), check="size")
        if manifest is None:
            return False
        samples = sample_shards(experiment, run) if needs_samples(experiment) else []
    except PipelineError as error:
        log.warning("%s; evaluating again", error)
        return False
    return manifest["samples"] == content_of(samples)


def needs_samples(experiment: Experiment) -> bool:
    return bool({"fid", "is"} & set(experiment.evaluate.metrics))


def sample_shards(experiment: Experiment, run: Run) -> list[Shard]:
    """The tars of the first num_images samples. Raises PipelineError where there are fewer."""
    folder = run.samples(sample_key(experiment, run.run_key))
    return shards_of(folder, "samples", experiment.sample.num_images)


def work(experiment: Experiment, run: Run) -> Iterator[list[Unit]]:
    """Yields what features need first, then all else at once; then adds up and seals the scores."""
    bounds = nll_units(experiment, run) if "nll" in experiment.evaluate.metrics else {}
    pending = [unit for file, unit in bounds.items() if not file.exists()]
    metrics: dict[str, Any] = {"scores": {}, "protocol": protocol(experiment, run)}
    samples = sample_shards(experiment, run) if needs_samples(experiment) else []
    if samples:
        yield preparations(experiment, run)
        extractor = extractor_of(experiment, run)
        sets = image_sets(experiment, run, extractor, samples)
        yield pending + [unit for images in sets.values() for unit in images.missing()]
        add_image_scores(metrics, experiment, run, extractor, sets)
    else:
        yield pending
    if bounds:
        nll = merge_nll(list(bounds), experiment.diffusion.timesteps)
        metrics["scores"] |= nll.pop("scores")
        write_json(directory(experiment, run) / NLL, nll)
    reasons = why_not(metrics["protocol"], experiment.evaluate.metrics)
    metrics["protocol"] |= {"comparable": not reasons, "why_not": reasons}
    _seal(experiment, run, metrics, samples)


def _seal(experiment: Experiment, run: Run, metrics: dict[str, Any], samples: list[Shard]) -> None:
    folder = directory(experiment, run)
    write_json(folder / METRICS, metrics)
    write_text(folder / CONFIG, to_yaml(experiment.evaluate))
    names = [METRICS, CONFIG] + ([NLL] if "nll" in experiment.evaluate.metrics else [])
    write_manifest(folder, names, samples=content_of(samples))


# FID and IS


def image_sets(
    experiment: Experiment, run: Run, extractor: "Extractor", samples: list[Shard]
) -> dict[str, ImageSet]:
    """The samples, the reference split unless its statistics are known, and the reference points at the same
    number of images: the other split of the data, a Gaussian, noise."""
    config, n, shared = (
        experiment.evaluate,
        experiment.sample.num_images,
        run.data / "references" / "features",
    )
    sets = {"samples": shard_set(extractor, samples, run.evaluation("units"), n)}
    if "fid" in config.metrics and Reference.of(run, extractor, config.reference).load() is None:
        sets["reference"] = shard_set(extractor, shards_of(run.data, config.reference), shared)
    index = tars.open_index(run.data)
    other = "test" if config.reference == "train" else "train"
    if other in index.splits:
        at_most = min(n, index.count(other))
        sets[other] = shard_set(extractor, shards_of(run.data, other, at_most), shared, at_most)
    shape, pixels = experiment.data.shape, pixels_file(experiment, run)
    if pixels:
        sets["gaussian"] = baseline_set(extractor, n, shape, shared, pixels)
    sets["noise"] = baseline_set(extractor, n, shape, shared, None)
    return sets


def add_image_scores(
    metrics: dict[str, Any],
    experiment: Experiment,
    run: Run,
    extractor: "Extractor",
    sets: dict[str, ImageSet],
) -> None:
    """Scores, reference points, class shares and their part of the protocol, once all features are there."""
    config, statistics = experiment.evaluate, None
    images = sets.pop("reference", None)
    if "fid" in config.metrics:
        reference = Reference.of(run, extractor, config.reference)
        statistics = reference.make(images) if images else reference.load()
    samples = sets.pop("samples").score()
    metrics["scores"] |= _scores(samples, statistics, config.metrics)
    metrics["reference_points"] = {
        name: {**_scores(images.score(), statistics, config.metrics), "n": images.n}
        for name, images in sets.items()
    }
    if config.features == "classifier" and samples.classes is not None:
        counts = np.bincount(samples.classes, minlength=experiment.data.labels)
        metrics["class_shares"] = (counts / len(samples.classes)).tolist()
        if experiment.sample.label is not None:
            asked = [experiment.asked_label(index) for index in range(len(samples.classes))]
            metrics["scores"]["as_asked"] = float(np.mean(samples.classes == np.array(asked)))
    metrics["protocol"] |= {
        "extractor": extractor.name,
        "official_extractor": extractor.is_official,
        "features": len(samples.moments.first),
        "reference_images": statistics.n if statistics else None,
        "splits": len(samples.sums.n) if samples.sums else None,
    }


def _scores(scored: "Scored", reference: "Statistics | None", asked: tuple[str, ...]) -> dict[str, float]:
    from pipeline.fidelity.scores import frechet_distance

    scores = {}
    if reference is not None:
        scores["fid"] = frechet_distance(scored.moments.statistics(), reference)
    if "is" in asked and scored.sums is not None:
        scores["is_mean"], scores["is_std"] = scored.sums.inception_score()
    return scores


# The NLL bound


def check(experiment: Experiment, run: Run) -> None:
    """Raise PipelineError for what the shards alone show to be impossible, before anything is trained."""
    if "nll" in experiment.evaluate.metrics:
        nll_images(experiment, run)


def nll_images(experiment: Experiment, run: Run) -> tuple[int, int]:
    """How many test images are scored, and how many there are."""
    there = tars.open_index(run.data).count("test")
    asked = experiment.evaluate.nll_images or there
    if asked > there:
        raise PipelineError(
            f"evaluate.nll_images is {asked}, but the test split has {there} images; lower it"
        )
    return asked, there


def nll_units(experiment: Experiment, run: Run) -> dict[Path, Unit]:
    """Each range of test images with the file of its bound, keyed by all that the bound depends on; nothing
    of it says how samples are drawn."""
    config = experiment.evaluate
    variance = config.variance or experiment.diffusion.variance
    weights = [checkpoint_step(experiment), experiment.sample.weights]
    test = content_of(shards_of(run.data, "test"))
    folder = (
        run.evaluation("units") / f"nll-{hash_of([run.run_key, test, weights, config.decoder, variance])}"
    )
    n, units = nll_images(experiment, run)[0], {}
    for start in range(0, n, config.nll_batch_size):
        stop = min(start + config.nll_batch_size, n)
        file = folder / f"{start:06d}-{stop:06d}.npz"
        args = (experiment, run, start, stop, file)
        units[file] = Unit(bound, args, f"NLL of test images {start}-{stop - 1}", stop - start)
    return units


def bound(ctx: WorkerContext, experiment: Experiment, run: Run, start: int, stop: int, file: Path) -> None:
    """The work unit: all terms of the bound of test images [start, stop), float32 as they were computed."""
    config = experiment.evaluate
    net = load_network(experiment, run, checkpoint_step(experiment), experiment.sample.weights, ctx.device)
    pixels, classes = tars.load_images(run.data, "test", start, stop)
    index, shape = torch.arange(start, stop), experiment.data.shape
    result = bits_per_dim(
        Diffusion(experiment.diffusion),
        net,
        from_uint8(torch.from_numpy(pixels).to(ctx.device)),
        lambda t: normal(experiment.seed, Stream.NLL, t, index, shape, ctx.device),
        timesteps_per_call=timesteps_per_call(stop - start, shape),
        decoder=config.decoder,
        variance=config.variance,
        context=torch.from_numpy(classes).to(ctx.device) if experiment.takes_labels else None,
    )
    arrays = {name: getattr(result, name).float().numpy() for name in ("terms", "mse", "prior")}
    write_arrays(file, **arrays)


def timesteps_per_call(images: int, shape: tuple[int, int, int]) -> int:
    """Few images leave the time to overhead instead of the network, so some of their timesteps share a call."""
    most_images, most_pixels = NLL_CALL
    return max(1, min(most_images, most_pixels // (shape[1] * shape[2])) // images)


def merge_nll(files: list[Path], timesteps: int) -> dict[str, Any]:
    """Means over the images of all units: the scores, and what nll.json holds."""
    terms, mse, prior, n = np.zeros(timesteps), np.zeros(timesteps), 0.0, 0
    for file in files:
        arrays = read_arrays(file)
        terms += arrays["terms"].sum(axis=0, dtype=np.float64)
        mse += arrays["mse"].sum(axis=0, dtype=np.float64)
        prior += float(arrays["prior"].sum(dtype=np.float64))
        n += len(arrays["prior"])
    return summarise_nll(terms / n, mse / n, prior / n, n)


def summarise_nll(terms: np.ndarray, mse: np.ndarray, prior: float, n: int) -> dict[str, Any]:
    """From means over n images of terms (T,), mse (T,) and prior."""
    rows = (torch.from_numpy(terms)[None], torch.from_numpy(mse)[None], torch.tensor([prior]).double())
    mean = Likelihood(torch.arange(len(terms)), *rows)
    curve = rate_distortion(mean)
    points = zip(curve.rate.tolist(), curve.rmse.tolist(), strict=True)
    return {
        "scores": {
            "nll_bpd": float(mean.total),
            "rate_bpd": float(curve.rate[-1]),
            "distortion_bpd": curve.distortion,
            "prior_bpd": prior,
            "rmse": float(curve.rmse[-1]),
        },
        "terms": terms.tolist(),
        "mse": mse.tolist(),
        "prior": prior,
        "n": n,
        "rate_distortion": [
            {"k": k, "rate_bpd": rate, "rmse": rmse} for k, (rate, rmse) in enumerate(points, 1)
        ],
    }


# The protocol


def protocol(experiment: Experiment, run: Run) -> dict[str, Any]:
    """How the scores come about: what no number of ours stands without."""
    config = experiment.evaluate
    found: dict[str, Any] = {"checkpoint": checkpoint_step(experiment), "weights": weights_kind(experiment)}
    if rule := checkpoint_rule(experiment):
        found["checkpoint_rule"] = rule
    if needs_samples(experiment):
        drawn = tars.open_index(run.samples(sample_key(experiment, run.run_key))).facts["protocol"]
        found |= drawn | {"n": experiment.sample.num_images, "reference": config.reference}
    if "nll" in config.metrics:
        asked, there = nll_images(experiment, run)
        variance = config.variance or experiment.diffusion.variance
        found |= {"decoder": config.decoder, "nll_variance": variance}
        found |= {"nll_images": asked, "test_images": there}
    return found


def why_not(found: dict[str, Any], asked: tuple[str, ...]) -> list[str]:
    """What keeps these scores from being comparable with the paper's; empty where nothing does."""
    reasons = [] if found["weights"] == "ema" else [f"{found['weights']} weights, not EMA"]
    if "fid" in asked or "is" in asked:
        reasons += _why_not_images(found)
    if "is" in asked and found["splits"] is None:
        reasons.append("no IS: these features know no classes")
    if "nll" in asked and found["nll_images"] < found["test_images"]:
        reasons.append(f"NLL of {found['nll_images']} of {found['test_images']} test images")
    if "nll" in asked and found["decoder"] != "tanh":
        reasons.append(f"{found['decoder']} decoder, not the authors' tanh")
    return reasons


def _why_not_images(found: dict[str, Any]) -> list[str]:
    n, steps, timesteps = found["n"], found["steps"], found["timesteps"]
    reasons = []
    if n != PAPER_SAMPLES:
        reasons.append(f"n = {n:,}, not {PAPER_SAMPLES:,}")
    if n <= found["features"]:
        reasons.append(f"rank-deficient: n = {n} is not above {found['features']} features")
    if found["sampler"] != "ancestral" or steps != timesteps:
        reasons.append(f"{steps} steps of the {found['sampler']} sampler, not {timesteps} ancestral ones")
    if not found["official_extractor"]:
        reasons.append(f"features of {found['extractor']}, not of the published Inception")
    if found["reference"] != "train":
        reasons.append(f"reference {found['reference']}, not train")
    return reasons

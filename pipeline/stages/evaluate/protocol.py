"""The protocol of scores, and its differences from the paper's."""

from pipeline.scores import distances
from pipeline.scores.reference import name_reference
from pipeline.scores.results import ScoreProtocol
from pipeline.stages.evaluate.bound import choose_bound_variance, count_images
from pipeline.store import tars
from pipeline.store.run import Place

PAPER_SAMPLES = 50_000


def describe_score_protocol(place: Place) -> ScoreProtocol:
    """Describe how the scores come about; `images` adds what only the features tell."""
    experiment, config = place.experiment, place.experiment.evaluate
    found: ScoreProtocol = {"checkpoint": experiment.checkpoint_step, "weights": experiment.weights_kind}
    if rule := experiment.checkpoint_rule:
        found["checkpoint_rule"] = rule
    if set(config.metrics) - {"nll"}:
        found |= tars.open_shards(place.samples).facts["protocol"]
        found |= {"n": experiment.sample.num_images, "reference": name_reference(config.reference)}
    if "nll" in config.metrics:
        scored, there = count_images(place)
        found |= {
            "decoder": config.decoder, "nll_variance": choose_bound_variance(experiment),
            "nll_precision": config.precision, "nll_images": scored, "test_images": there,
        }  # fmt: skip
    return found


def explain_differences(found: ScoreProtocol, metrics: tuple[str, ...]) -> list[str]:
    """List the reasons why these scores are not comparable with the paper's; none if they are."""
    reasons = [(found["weights"] != "ema", f"{found['weights']} weights, not EMA")]
    if set(metrics) - {"nll"}:
        n, steps, timesteps = found["n"], found["steps"], found["timesteps"]
        sampler, width, reference = found["sampler"], found["features"], found["reference"]
        chain = f"{steps} steps of the {sampler} sampler, not {timesteps} ancestral ones"
        features = f"features of {found['extractor']}, not of the published Inception"
        reasons += [
            (n != PAPER_SAMPLES, f"n = {n:,}, not {PAPER_SAMPLES:,}"),
            (n <= width, f"rank-deficient: n = {n} is not above {width} features"),
            (sampler != "ancestral" or steps != timesteps, chain),
            (not found["official_extractor"], features),
            (reference != "train", f"reference {reference}, not train"),
        ]
    if "is" in metrics:
        few = found["n"] <= distances.SPLITS
        why = f"it needs more than {distances.SPLITS} images" if few else "these features know no classes"
        reasons.append((found["splits"] is None, f"no IS: {why}"))
    if "nll" in metrics:
        n, there, decoder = found["nll_images"], found["test_images"], found["decoder"]
        reasons += [
            (n < there, f"NLL of {n} of {there} test images"),
            (decoder != "tanh", f"{decoder} decoder, not the authors' tanh"),
        ]
    return [reason for differs, reason in reasons if differs]

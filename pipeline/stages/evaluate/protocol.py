"""How scores come about, and what of that keeps them from standing beside the paper's."""

from pipeline.config import checkpoint_rule, checkpoint_step, weights_kind
from pipeline.scores.reference import name_reference
from pipeline.scores.results import ScoreProtocol
from pipeline.stages.evaluate.bound import choose_variance, count_images
from pipeline.store import tars
from pipeline.store.run import Place

PAPER_SAMPLES = 50_000


def describe_protocol(place: Place) -> ScoreProtocol:
    """Describe how the scores come about; `images` adds what only the features show."""
    experiment, config = place.experiment, place.experiment.evaluate
    found: ScoreProtocol = {
        "checkpoint": checkpoint_step(experiment), "weights": weights_kind(experiment)
    }  # fmt: skip
    if rule := checkpoint_rule(experiment):
        found["checkpoint_rule"] = rule
    if set(config.metrics) - {"nll"}:
        found |= tars.open_index(place.samples).facts["protocol"]
        found |= {"n": experiment.sample.num_images, "reference": name_reference(config.reference)}
    if "nll" in config.metrics:
        asked, there = count_images(place)
        found |= {
            "decoder": config.decoder, "nll_variance": choose_variance(experiment),
            "nll_precision": config.precision, "nll_images": asked, "test_images": there,
        }  # fmt: skip
    return found


def explain_differences(found: ScoreProtocol, asked: tuple[str, ...]) -> list[str]:
    """List what keeps these scores from being comparable with the paper's; nothing where they are."""
    reasons = [] if found["weights"] == "ema" else [f"{found['weights']} weights, not EMA"]
    if set(asked) - {"nll"}:
        reasons += _explain_images(found)
    if "is" in asked and found["splits"] is None:
        reasons.append("no IS: these features know no classes")
    if "nll" in asked and found["nll_images"] < found["test_images"]:
        reasons.append(f"NLL of {found['nll_images']} of {found['test_images']} test images")
    if "nll" in asked and found["decoder"] != "tanh":
        reasons.append(f"{found['decoder']} decoder, not the authors' tanh")
    return reasons


def _explain_images(found: ScoreProtocol) -> list[str]:
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

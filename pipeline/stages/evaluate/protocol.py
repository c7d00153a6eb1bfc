"""How scores come about, and what of that keeps them from standing beside the paper's."""

from typing import Any

from pipeline.config import Experiment, checkpoint_rule, checkpoint_step, weights_kind
from pipeline.scores.reference import name_of
from pipeline.stages.evaluate.bound import nll_images
from pipeline.store import tars
from pipeline.store.run import Place

PAPER_SAMPLES = 50_000


def protocol(experiment: Experiment, run: Place) -> dict[str, Any]:
    """What no number of ours stands without; `images` adds what only the features show."""
    config = experiment.evaluate
    found: dict[str, Any] = {"checkpoint": checkpoint_step(experiment), "weights": weights_kind(experiment)}
    if rule := checkpoint_rule(experiment):
        found["checkpoint_rule"] = rule
    if set(config.metrics) - {"nll"}:
        drawn = tars.open_index(run.of(experiment).samples).facts["protocol"]
        found |= drawn | {"n": experiment.sample.num_images, "reference": name_of(config.reference)}
    if "nll" in config.metrics:
        asked, there = nll_images(experiment, run)
        variance = config.variance or experiment.diffusion.variance
        found |= {"decoder": config.decoder, "nll_variance": variance, "nll_precision": config.precision}
        found |= {"nll_images": asked, "test_images": there}
    return found


def why_not(found: dict[str, Any], asked: tuple[str, ...]) -> list[str]:
    """What keeps these scores from being comparable with the paper's; empty where nothing does."""
    reasons = [] if found["weights"] == "ema" else [f"{found['weights']} weights, not EMA"]
    if set(asked) - {"nll"}:
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

"""The protocol of scores, and its differences from the paper's."""

from ddpm.config import DiffusionConfig
from ddpm.schedules import get_betas
from pipeline.config.checks import Tree
from pipeline.config.sections import NEED_IMAGES
from pipeline.scores.metrics import FAMILIES, OF_SAMPLES, needs_samples
from pipeline.stages.evaluate.bound import choose_bound_variance, count_images, load_profile
from pipeline.store import tars
from pipeline.store.files import hash_file
from pipeline.store.keys import hash_content
from pipeline.store.run import Place


def describe_score_protocol(place: Place) -> Tree:
    """Return the protocol of the scores; `images`: the entries on the features."""
    experiment, config, diffusion = place.experiment, place.experiment.evaluate, place.experiment.diffusion
    selected = experiment.selected if experiment.checkpoint_rule else None
    origin = "published" if experiment.published.weights else str(experiment.sample.checkpoint)
    found: Tree = {
        "official_data": tars.open_shards(place.data).facts.get("official"),
        "timesteps": diffusion.timesteps,
        "schedule": describe_schedule(diffusion),
        "conditional": experiment.model.takes_labels, "weights": experiment.weights_kind,
        "checkpoint": experiment.checkpoint_step, "checkpoint_rule": selected.rule if selected else origin,
        "minimum_fid": selected is not None and selected.candidates > 1,
    }  # fmt: skip
    made = place.read_provenance()
    codes = dict(made.get("codes") or {})
    if codes and list(codes)[-1] != made.get("code"):
        codes["now"] = f"scores by {made.get('commit') or made.get('code')}"
    if len(codes) > 1:
        found["code"] = ", then ".join(codes.values())
    if needs_samples(config.metrics):
        found |= tars.open_shards(place.samples).facts["protocol"]
        found |= {"n": experiment.sample.num_images, "first_index": experiment.sample.first_index}
        file = config.reference_file  # its content counts, not its path
        found["reference"] = f"{file.name} (sha256 {hash_file(file)[:8]})" if file else config.reference
    if "nll" in config.metrics:
        found["nll_images"], there = count_images(place)
        found["train_images" if config.nll_split == "train" else "test_images"] = there
        found |= {
            "decoder": config.decoder, "nll_variance": choose_bound_variance(experiment),
            "nll_precision": config.precision, "nll_compiled": config.compile, "nll_split": config.nll_split,
            "nll_timesteps": config.nll_timesteps, "nll_se": "over images, s / sqrt(n)",
        }  # fmt: skip
        if config.nll_timesteps:
            found["nll_profile"] = f"estimated, drawn by profile {load_profile(place)[1]}"
    return found


def describe_schedule(diffusion: DiffusionConfig) -> str:
    """Return the name of a schedule, and its smallest and largest beta."""
    betas = get_betas(diffusion)
    name = f"own betas {hash_content(diffusion.betas)}" if diffusion.betas else diffusion.beta_schedule
    return f"{name}, beta {betas.min():g} to {betas.max():g}"


ALL, SAMPLES, NLL = FAMILIES, OF_SAMPLES, ("nll",)
# For a field of the protocol: the metrics that depend on it, the paper's value, the reason to name if it differs.
PAPER: dict[str, tuple[tuple[str, ...], object, str]] = {
    "weights": (ALL, "ema", "{weights} weights, not EMA"),
    "official_data": (ALL, True, "images not known to be CIFAR-10's"),
    "timesteps": (ALL, 1000, "T = {timesteps}, not 1000"),
    "schedule": (ALL, "linear, beta 0.0001 to 0.02", "schedule {schedule}, not linear, beta 0.0001 to 0.02"),
    "conditional": (ALL, False, "a network that is told the class"),
    "minimum_fid": (ALL, True, "checkpoint {checkpoint_rule}, not that of minimum FID among several"),
    "n": (SAMPLES, 50_000, "n = {n:,}, not 50,000"),
    "sampler": (SAMPLES, "ancestral", "the {sampler} sampler, not the ancestral one"),
    "steps": (SAMPLES, 1000, "{steps} steps of the sampler, not 1000"),
    # None: of another sampler, which is a reason by itself
    "variance": (SAMPLES, ("fixedlarge", "learned", None), "sampling variance {variance}, not fixedlarge"),
    "label": (SAMPLES, None, "samples of class {label}"),
    "guidance_scale": (SAMPLES, 1, "guidance of scale {guidance_scale}"),
    "precision": (SAMPLES, "fp32", "samples in {precision}, not fp32"),
    "rounding": (SAMPLES, "nearest", "{rounding} rounding, not to the nearest"),
    "official_extractor": (SAMPLES, True, "features of {extractor}, not of the published Inception"),
    "reference": (("fid", *NEED_IMAGES), "train", "reference {reference}, not train"),
    "reference_images": (("fid",), 50_000, "a reference of {reference_images} images, not 50,000"),
    "fid_test_images": (("fid_test",), 10_000, "a test set of {fid_test_images} images, not 10,000"),
    "splits": (("is",), 10, "no IS over ten splits: the features know no classes, or the images are few"),
    "decoder": (NLL, "tanh", "{decoder} decoder, not the authors' tanh"),
    "nll_variance": (NLL, "fixedlarge", "NLL with {nll_variance}, not fixedlarge"),
    "nll_precision": (NLL, "fp32", "NLL in {nll_precision}, not fp32"),
    "nll_images": (
        NLL,
        {"train": 50_000, "test": 10_000},  # by nll_split
        "NLL of {nll_images} {nll_split} images, not all of CIFAR-10's",
    ),
}


def explain_differences(found: Tree, metrics: tuple[str, ...]) -> list[str]:
    """List the reasons why these scores are not comparable with the paper's; none if they are."""
    reasons = []
    for field, (moved, paper, reason) in PAPER.items():
        if set(moved) & set(metrics):
            if isinstance(paper, dict):
                paper = paper.get(found.get("nll_split"))
            if field not in found:
                reasons.append(f"nothing says the {field}")
            elif found[field] not in (paper if isinstance(paper, tuple) else (paper,)):
                reasons.append(reason.format_map(found))
    if set(SAMPLES) & set(metrics) and found["n"] <= found["features"]:
        reasons.append(f"rank-deficient: n = {found['n']} is not above {found['features']} features")
    return reasons

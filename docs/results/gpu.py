"""docs/results/gpu.md with its JSON twin and its picture, from the run directory of a training on a GPU.

python docs/results/gpu.py RUN
"""

import json
import shutil
import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch
from cifar10 import format_features

from pipeline.engine.find import read_place
from pipeline.scores.classifier import load_classifier
from pipeline.scores.metrics import METRICS, Results
from pipeline.store import tars
from pipeline.store.files import read_json
from pipeline.store.log import read_points

HERE = Path(__file__).parent
PICTURE = HERE.parent / "pictures" / "cifar10-gpu-samples.png"
WARM = 500  # steps after which the rate is steady
BOUND = ("nll_bpd", "rate_bpd", "distortion_bpd")
# Of the first samples of the longest run, given by eye before the classifier's were seen.
EYE = [
    5, 7, 5, 2, 9, 2, 5, 1, 3, 7, 1, 2, 4, 7, 8, 1, 1, 0, 4, 7, 9, 8, 6, 1, 3, 8, 8, 3, 7, 5, 2, 2,
    3, 3, 2, 6, 2, 8, 9, 4, 3, 2, 0, 4, 8, 0, 9, 1, 4, 1, 8, 8, 2, 7, 7, 0, 6, 9, 6, 6, 8, 7, 9, 2,
]  # fmt: skip


def main(path: Path) -> None:
    file = HERE / "gpu.json"
    known = {one["steps"]: one for one in json.loads(file.read_text())["runs"]} if file.exists() else {}
    found = read_run(path)
    known[found["steps"]] = found
    runs = [known[steps] for steps in sorted(known)]
    file.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    (HERE / "gpu.md").write_text(format_page(runs))
    shutil.copy(next(path.glob("samples/*/grid.png")), PICTURE)


def read_run(path: Path) -> dict:
    """Return what the page says of a run directory."""
    place = read_place(path.absolute())
    points = [(point["step"], point["metrics"]) for point in read_points(place.log)]
    found = [read_json(file, Results) for file in sorted(place.path.glob("evaluation/*/metrics.json"))]
    samples, drawn = (
        read_json(place.path / "spent.json", dict)["samples"]["50"][key] for key in ("images", "seconds")
    )
    steps, size = place.experiment.checkpoint_step, place.experiment.train.batch_size
    every = place.experiment.train.log_every
    seconds = [size * every / m["train/images_per_second"] for _, m in points]
    pictures, bounds = (
        [
            {key: one[key] for key in ("scores", "reference_points", "protocol") if key in one}
            for one in found if name in one["scores"]
        ] for name in ("fid", "nll_bpd")
    )  # fmt: skip
    return {
        "steps": steps, "batch_size": size, "seconds": round(sum(seconds), 1), "first_seconds": round(seconds[0], 1),
        "steps_per_second": round(
            median(m["train/images_per_second"] for step, m in points if step > WARM) / size, 2
        ),
        "losses": {step: round(m["train/loss"], 5) for step, m in points if step % 1000 == 0},
        "samples": samples, "samples_seconds": round(drawn, 1),
        "accuracy": next(
            one["protocol"]["classifier_accuracy"] for one in found if "classifier_accuracy" in one["protocol"]
        ),
        "commits": read_json(place.path / "commits.json", dict), "scores": pictures,
        "bounds": sorted(bounds, key=lambda one: one["protocol"]["checkpoint"]),
        "labels": {"by_eye": EYE, "by_classifier": label_samples(path)},
    }  # fmt: skip


def label_samples(path: Path) -> list[int]:
    """Return the classifier's labels of the first samples."""
    (weights,) = path.parent.glob("data/*/classifier/classifier.safetensors")
    images, _ = tars.load_images(next(path.glob("samples/*")), "samples", 0, len(EYE))
    with torch.no_grad():
        logits = load_classifier(weights).eval()(torch.from_numpy(images))[1]
    labels: list[int] = logits.argmax(1).tolist()
    return labels


def format_page(runs: list[dict]) -> str:
    """Return the page: the longest run, with the scores of the shorter ones beside its own."""
    twin = runs[-1]
    every = [step for step in twin["losses"] if int(step) in (1000, 2000, 5000, 10_000, 15_000, 18_000)]
    losses = " | ".join(f"{twin['losses'][step]:.4f}" for step in every)
    heads = " | ".join(f"{int(step):,}" for step in every)
    for one in twin["scores"]:
        name = one["protocol"]["extractor"]
        for run in runs[:-1]:
            same = next(it["scores"] for it in run["scores"] if it["protocol"]["extractor"] == name)
            one["reference_points"] = {f"after {run['steps']:,} steps": same, **one["reference_points"]}
    tables = "\n".join(format_features(one) for one in twin["scores"])
    bounds = "\n".join(
        f"| {one['protocol']['checkpoint']:,} | {one['protocol']['checkpoint'] * twin['batch_size']:,} | "
        + " | ".join(METRICS[name].format_score(one["scores"]) for name in BOUND) + " |"
        for one in twin["bounds"]
    )  # fmt: skip
    eye, classifier = (np.array(twin["labels"][of]) for of in ("by_eye", "by_classifier"))
    agree = (eye == classifier).sum()
    by_chance = (np.bincount(eye, minlength=10) * np.bincount(classifier, minlength=10)).sum() / len(eye)
    return f"""# CIFAR-10 after seven minutes of an H100

![The first 100 samples](../pictures/cifar10-gpu-samples.png)

These are the first 100 samples, not selected. The network is the paper's (35.7 M parameters), after
{twin["steps"]:,} of its 800,000 steps: {twin["steps"] * twin["batch_size"]:,} images, batch
{twin["batch_size"]}, bf16. They took {twin["seconds"]:.0f} seconds. In the first {twin["first_seconds"]:.0f},
for 100 steps, kernels are compiled and the step is recorded; then there were
{twin["steps_per_second"]} steps/s. {twin["samples"]:,} images of 50 steps took
{twin["samples_seconds"]:.0f} seconds.

| step | {heads} |
| --- |{" --- |" * len(every)}
| mean loss of the last 100 steps | {losses} |

## The bound

All 10,000 test images, EMA, bf16, with t = 0 and 7 draws of t for each; ± is one standard error. The paper has
3.75, 1.78 and 1.97 after 102,400,000 images. [The ladder](ladder.md) had predicted these points from small networks,
too low: its page has both. Of the last checkpoint only 6,000 images were scored when the time was over.

| step | images seen | NLL | rate | distortion |
| --- | --- | --- | --- | --- |
{bounds}

## The samples beside other images

gaussian: drawn with the mean and covariance of the training images. ± is one standard error. The shorter run is
another one, of the day before: the same seed and recipe, the same 7,000 first steps up to summation order.

{tables}
None of these is comparable with the paper's scores, which have other features and 50,000 samples. The classifier
is weak: it names {100 * twin["accuracy"]:.0f} % of the test images rightly. By its KID the samples are not separable
from the Gaussian; by the other three scores they are better. Labels that were given by eye, before its own were seen,
agree with it on {agree} of the first {len(eye)} samples; {by_chance:.0f} were to be expected by chance.

## How it was made

The machine was lent for fifteen minutes at a time. The configuration's 30,000 steps take eleven, so `train.steps` was
20,000, and the clock stopped it at {twin["steps"]:,}, with a checkpoint. The NLL and the samples were made there; the
samples were scored on another machine, by the same stage, from the same images. The code was that of commit
{twin["commits"]["train"][0][:7]}; a page of results was the difference.

```
ddpm run cifar10_short data.path=FOLDER cluster.workers=0 train.steps={twin["steps"]} sample.steps=50 \\
  evaluate.metrics=[nll] evaluate.precision=bf16 train.keep_steps=[5000,10000]  # then train.steps=5000 and so on
ddpm evaluate cifar10_short ... evaluate.features=classifier   # then efficientnet-lite0, evaluate.reference=test
python docs/results/gpu.py RUN         # this page
```

[Performance](../performance.md#on-a-gpu) has the rates.
"""


if __name__ == "__main__":
    main(Path(sys.argv[1]))

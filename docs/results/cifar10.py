"""docs/results/cifar10.md with its JSON twin and its pictures, from a run directory of CIFAR-10.

python docs/results/cifar10.py RUN

The samples are what `ddpm draw RUN` draws; the scores are those of all test images at the run's newest checkpoint.
"""

import json
import shutil
import sys
from pathlib import Path
from statistics import median

import torch

from ddpm.images import to_uint8
from pipeline import load
from pipeline.drawing.grids import save_grid
from pipeline.engine.find import read_place
from pipeline.report.paper import LMMSE
from pipeline.scores.metrics import METRICS, Results
from pipeline.store import tars
from pipeline.store.checkpoint import create_network
from pipeline.store.files import read_json
from pipeline.store.log import read_points
from pipeline.store.run import list_steps

HERE = Path(__file__).parent
PICTURES = HERE.parent / "pictures"
PAPER = {"nll_bpd": 3.75, "rate_bpd": 1.78, "distortion_bpd": 1.97, "rmse": 0.95}  # Sec. 4.3, Tables 1 and 4
LINEAR = {name: LMMSE[name] for name in ("rate_bpd", "rmse")}
IMAGES = 64
OPTIMUM = "optimum.svg"
PARTS = ("scores", "reference_points", "protocol")


def main(path: Path) -> None:
    place = read_place(path.absolute())
    step = list_steps(place.train)[-1]
    found = [read_json(file, Results) for file in sorted(place.path.glob("evaluation/*/metrics.json"))]
    found = [one for one in found if one["protocol"]["checkpoint"] == step]
    (results,) = (one for one in found if one["protocol"].get("nll_images") == 10_000)
    others = [one for one in found if one is not results]
    rates = [point["metrics"]["train/images_per_second"] for point in read_points(place.log)]
    train = place.experiment.train
    (optimum,) = place.path.glob(f"figures/*/{OPTIMUM}")
    shutil.copy(optimum, PICTURES / f"cifar10-{OPTIMUM}")
    model = load(place.path)
    twin = {
        "drawn": {key: model.options.get(key) for key in ("sampler", "steps", "eta", "variance")},
        "optimum": read_json(optimum.with_name("manifest.json"), dict)["findings"][OPTIMUM],
        "scores": results["scores"], "protocol": results["protocol"], "paper": PAPER, "linear": LINEAR,
        "parameters": sum(t.numel() for t in create_network(place.experiment, "meta").parameters()),
        "width": place.experiment.model.channels, "images": step * train.batch_size,
        "images_per_second": [round(value, 1) for value in (min(rates), median(rates), max(rates))],
        "commits": read_json(place.path / "commits.json", dict),
        "others": [{key: one[key] for key in PARTS if key in one} for one in others],
        "train_seconds": read_json(place.path / "timings.json", dict)["train"],
    }  # fmt: skip
    (HERE / "cifar10.json").write_text(json.dumps(twin, indent=1) + "\n")
    (HERE / "cifar10.md").write_text(format_page(twin))
    save_grid(to_uint8(model.sample(IMAGES)), 8, PICTURES / "cifar10-samples.png")
    test = torch.from_numpy(tars.load_images(place.data, "test", 0, IMAGES)[0])
    save_grid(test, 8, PICTURES / "cifar10-test.png")


def format_page(twin: dict) -> str:
    """Return the page."""
    scores, protocol, hours = twin["scores"], twin["protocol"], twin["train_seconds"] / 3600
    rows = []
    for name, paper in PAPER.items():
        metric, line = METRICS[name], LINEAR.get(name)
        ours = metric.format_score(scores)
        rows.append(f"| {metric.title} | {ours} | {paper} | {line or ''} |")
    low, middle, high = twin["images_per_second"]
    is_useful = all(scores[name] < value for name, value in LINEAR.items())
    verdict = (
        "It beats the best linear denoiser, which needs no training; its samples have the shapes and\n"
        "colours of pictures, few show a thing that can be named"
        if is_useful
        else "**Not yet useful**: it does not beat the best linear denoiser, which needs no training"
    )
    table = "\n".join(rows)
    pictures = "\n".join(format_features(one) for one in twin["others"] if "fid" in one["scores"])
    checks = "\n".join(format_check(one) for one in twin["others"] if "nll_bpd" in one["scores"])
    return f"""# CIFAR-10, measured

| the first {IMAGES} samples, not selected | the first {IMAGES} test images |
| --- | --- |
| ![Samples](../pictures/cifar10-samples.png) | ![Test images](../pictures/cifar10-test.png) |

| | this run | paper | best linear denoiser |
| --- | --- | --- | --- |
{table}

{verdict}. It is far from the paper, which has {35_746_307 / twin["parameters"]:.0f} times as many
parameters and has seen {102_400_000 / twin["images"]:,.0f} times as many images.

[A GPU's samples](gpu.md) came later. No GPU was available here: this is the paper's network at a quarter of its width
({twin["width"]} channels, {twin["parameters"]:,} parameters), after {twin["images"]:,} images,
{hours:.1f} hours of two shared cores at {middle:g} images/s (median; {low:g} to {high:g}).
[The ladder](ladder.md) trains and scores its widths and lengths; [short runs](short-runs.md) says why its samples
are not noise, as those of [the first run](first-run.md) were; [schedules and dropout](schedules-dropout.md) are
compared by eight settings of it.

## Where it loses

{twin["optimum"]} These are the first
steps of a chain, which decide the colours and the layout of an image.

![RMSE of the estimate of x_0 at each noise level, beside the best linear denoiser's](../pictures/cifar10-{OPTIMUM})

## The samples beside other images

gaussian: drawn with the mean and covariance of the training images.

{pictures}
## Protocol

NLL of all {protocol["nll_images"]:,} test images, estimated with t = 0 and {protocol["nll_timesteps"]} draws of t for
each (80,000 passes), {protocol["nll_precision"]}, EMA weights of step {protocol["checkpoint"]:,}; ± is one standard
error. The samples at the top are of {describe_sampler(twin["drawn"])}.
Not comparable with the paper: {"; ".join(protocol["why_not"])}.

The same checkpoint in other ways:

{checks}

## Commands

```
ddpm sweep ladder data.path=FOLDER_OR_ARCHIVE cluster.workers=0   # trains and scores; the same command goes on
S="sample.num_images=2000 sample.sampler=dpm++ sample.eta=1 sample.variance=null sample.steps=20"
ddpm evaluate RUN/experiment.yaml $S evaluate.metrics=[fid,fid_test,is,kid] evaluate.features=classifier
ddpm evaluate RUN/experiment.yaml $S evaluate.metrics=[fid,is,kid,prc] evaluate.features=efficientnet-lite0 \\
  evaluate.reference=test
ddpm report RUN/experiment.yaml figures.which=[optimum]
python docs/results/ladder.py RUN                                 # adds its points to the ladder's page
python docs/results/cifar10.py RUN                                # this page and its pictures
```

Trained by commit `{twin["commits"]["train"][-1][:12]}`. [cifar10.json](cifar10.json) holds every number of this page.
"""


def format_features(one: dict) -> str:
    """Return the table of an evaluation of samples: this run beside test images, a Gaussian and noise at equal n."""
    protocol = one["protocol"]
    names = [name for name in ("fid", "is_mean", "kid_mean", "precision", "recall") if name in one["scores"]]
    rows = {"this run": one["scores"], **one["reference_points"]}
    titles = " | ".join(METRICS[name].title for name in names)
    lines = [f"| {protocol['n']:,} images each | {titles} |", f"| --- |{' --- |' * len(names)}"]
    for row, scores in rows.items():
        cells = (METRICS[name].format_score(scores) if scores.get(name) is not None else "" for name in names)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    against = f"{protocol['reference_images']:,} {protocol['reference']} images"
    lines.append(f"\nFeatures: {protocol['extractor']}; {describe_sampler(protocol)}; against {against}.\n")
    return "\n".join(lines)


def describe_sampler(of: dict) -> str:
    """Return how samples were drawn, as a configuration names it."""
    kind = of["variance"] if of["sampler"] == "ancestral" else f"eta {of['eta']:g}"
    return f"{of['steps']:,} steps of {of['sampler']} ({kind})"


def format_check(one: dict) -> str:
    """Return a line: the NLL of few images, by all T or by the estimator."""
    protocol = one["protocol"]
    draws = f"t = 0 and {protocol['nll_timesteps']} draws of t" if protocol["nll_timesteps"] else "every t"
    value = METRICS["nll_bpd"].format_score(one["scores"])
    code = "another commit" if "code" in protocol else "the commit that trained it"
    return f"- {protocol['nll_images']:,} test images, {draws}, by the code of {code}: NLL {value}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

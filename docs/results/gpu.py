"""docs/results/gpu.md with its JSON twin and its picture, from the run directory of a training on a GPU.

python docs/results/gpu.py RUN
"""

import json
import shutil
import sys
from pathlib import Path
from statistics import median

from cifar10 import format_features

from pipeline.engine.find import read_place
from pipeline.scores.metrics import Results
from pipeline.store.files import read_json
from pipeline.store.log import read_points

HERE = Path(__file__).parent
PICTURE = HERE.parent / "pictures" / "cifar10-gpu-samples.png"
WARM = 500  # steps after which the rate is steady


def main(path: Path) -> None:
    place = read_place(path.absolute())
    points = [(point["step"], point["metrics"]) for point in read_points(place.log)]
    found = [read_json(file, Results) for file in sorted(place.path.glob("evaluation/*/metrics.json"))]
    samples, drawn = (
        read_json(place.path / "spent.json", dict)["samples"]["50"][key] for key in ("images", "seconds")
    )
    steps, size = place.experiment.checkpoint_step, place.experiment.train.batch_size
    every = place.experiment.train.log_every
    seconds = [size * every / m["train/images_per_second"] for _, m in points]
    twin = {
        "steps": steps, "batch_size": size, "seconds": round(sum(seconds), 1), "first_seconds": round(seconds[0], 1),
        "steps_per_second": round(
            median(m["train/images_per_second"] for step, m in points if step > WARM) / size, 2
        ),
        "losses": {step: round(m["train/loss"], 5) for step, m in points if step % 1000 == 0},
        "samples": samples, "samples_seconds": round(drawn, 1),
        "accuracy": next(
            one["protocol"]["classifier_accuracy"] for one in found if "classifier_accuracy" in one["protocol"]
        ),
        "commits": read_json(place.path / "commits.json", dict),
        "scores": [
            {key: one[key] for key in ("scores", "reference_points", "protocol")}
            for one in found
        ],
    }  # fmt: skip
    (HERE / "gpu.json").write_text(json.dumps(twin, indent=1) + "\n")
    (HERE / "gpu.md").write_text(format_page(twin))
    shutil.copy(next(place.path.glob("samples/*/grid.png")), PICTURE)


def format_page(twin: dict) -> str:
    """Return the page."""
    losses = " | ".join(f"{value:.4f}" for value in twin["losses"].values())
    heads = " | ".join(f"{int(step):,}" for step in twin["losses"])
    tables = "\n".join(format_features(one) for one in twin["scores"])
    return f"""# CIFAR-10 after three minutes of an H100

![The first 100 samples](../pictures/cifar10-gpu-samples.png)

These are the first 100 samples, not selected. The network is the paper's (35.7 M parameters), after
{twin["steps"]:,} of its 800,000 steps: {twin["steps"] * twin["batch_size"]:,} images, batch
{twin["batch_size"]}, bf16. They took {twin["seconds"]:.0f} seconds. In the first {twin["first_seconds"]:.0f},
for 100 steps, kernels are compiled and the step is recorded; then there were
{twin["steps_per_second"]} steps/s. {twin["samples"]:,} images of 50 steps took
{twin["samples_seconds"]:.0f} seconds.

| step | {heads} |
| --- |{" --- |" * len(twin["losses"])}
| mean loss of the last 100 steps | {losses} |

## The samples beside other images

gaussian: drawn with the mean and covariance of the training images. ± is one standard error.

{tables}
None of these is comparable with the paper's scores, which have other features and 50,000 samples. The classifier
is weak: it names {100 * twin["accuracy"]:.0f} % of the test images rightly. By its KID the samples are no better than
the Gaussian, by its FID they are.

## What was not measured

The machine was lent for fifteen minutes, which ended before the NLL. So `train.steps` was 7,000, not 30,000, for
which no prediction had been written down: this run says nothing for or against one. [The ladder](ladder.md) now
has one for 30,000 steps. The samples were drawn there and scored on another machine, by the same stage, from the
same images. The code was that of commit
{twin["commits"]["train"][0][:7]} with the changes of the next.

## Commands

```
ddpm run cifar10_short data.path=FOLDER cluster.workers=0 train.steps={twin["steps"]} sample.steps=50 \\
  evaluate.features=classifier         # then evaluate.features=efficientnet-lite0 evaluate.reference=test
python docs/results/gpu.py RUN         # this page
```

[Performance](../performance.md#on-a-gpu) has the rates.
"""


if __name__ == "__main__":
    main(Path(sys.argv[1]))

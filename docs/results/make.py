"""docs/results/cifar10.md, its JSON twin and its pictures, from the files that a run, a sweep and `make bench` left.

python docs/results/make.py RUN SWEEP BENCHMARKS
"""

import json
import math
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
import yaml

from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from pipeline.report.paper import LMMSE, SAMPLES, STEPS, TABLE_4, TEST_IMAGES
from pipeline.store import tars

matplotlib.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
PICTURES = HERE.parent / "pictures"
PAPER = {
    "nll_bpd": 3.75, "rate_bpd": TABLE_4[1000][0], "distortion_bpd": 1.97, "rmse": TABLE_4[1000][1],
    "fid": 3.17, "is_mean": 9.46,
}  # fmt: skip
BOUND = ("nll_bpd", "rate_bpd", "distortion_bpd", "rmse")
NAMES = {
    "nll_bpd": "NLL, bits/dim, at most", "rate_bpd": "rate (L_1 to L_T)", "distortion_bpd": "distortion (L_0)",
    "rmse": "RMSE of 0 to 255", "fid": "FID", "is_mean": "IS",
}  # fmt: skip
SHOWN = ("samples", "progressive", "interpolation", "rate_distortion")
BATCH = 128  # of the paper
TRAINED_BY = (
    "03f37c06e9ca"  # seen in experiment.yaml while it trained; the commands that followed replaced it
)
SWEEP_SAYS = """What it says, of one seed, 8,000 images seen and 12 images scored: the schedule decides far more
than dropout does. `cosine` and `quad` lie {cosine:.2f} and {quad:.2f} bits/dim below `linear`; `const` begins at
beta = 0.02, and its distortion alone costs more than any other's NLL: the last step starts from noise of 18 grey
levels. This is the bound after so few steps, and says nothing of the pictures, for which the paper chose its
settings. Dropout has only cost so far: {to_02:.3f} bits/dim from 0.1 to 0.2, {to_04:.3f} to 0.4. Rates and
distortions of different schedules are not comparable by themselves, as the decoder's step lies at another noise
level; their sum is."""


def main(run: Path, sweep: Path, benchmarks: Path) -> None:
    found = gather(run, sweep, benchmarks)
    (HERE / "cifar10.json").write_text(json.dumps(found, indent=1) + "\n")
    draw_curves(found)
    draw_sweep(found["sweep"]["trials"])
    figures = sorted((run / "figures").glob("*/manifest.json"))[-1].parent
    for name in SHOWN:
        picture = next(figures.glob(f"{name}.*"))
        shutil.copy(picture, PICTURES / f"cifar10-{picture.name}")
    (HERE / "cifar10.md").write_text(page(found))


def gather(run: Path, sweep: Path, benchmarks: Path) -> dict[str, Any]:
    """All that the page says, nothing of it by hand."""
    experiment = yaml.safe_load((run / "experiment.yaml").read_text())
    experiment["data"]["path"] = None  # a place on one machine
    evaluations = [json.loads(path.read_text()) for path in run.glob("evaluation/*/metrics.json")]
    headline = max(evaluations, key=lambda e: (e["protocol"]["checkpoint"], e["protocol"].get("n", 0)))
    last = headline["protocol"]["checkpoint"]
    along = [e for e in evaluations if "n" not in e["protocol"] and e["protocol"]["nll_precision"] == "bf16"]
    points = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    done = [point for point in points if point["step"] <= last]
    trained = (done[-1]["time"] - done[0]["time"]) / 1000  # from the first point to the last
    nll = [json.loads(path.read_text()) for path in run.glob("evaluation/*/nll.json")]
    nll = [bound for bound in nll if "rate_distortion" in bound]  # of all timesteps
    bench = json.loads(benchmarks.read_text())
    return {
        "scores": headline["scores"],
        "protocol": headline["protocol"],
        "reference_points": headline["reference_points"],
        "linear": linear_denoiser(
            next((run.parent / "data").glob("cifar10-*")),
            {headline["protocol"]["nll_images"], *(e["protocol"]["nll_images"] for e in along)},
        ),
        "rate_distortion": max(nll, key=lambda one: one["n"])["rate_distortion"],
        "along": sorted(
            ({"step": e["protocol"]["checkpoint"], "images": e["protocol"]["nll_images"], **e["scores"]}
             for e in along if e["protocol"]["weights"] == "ema"), key=lambda row: row["step"]
        ),
        "raw": [e["scores"] for e in along if e["protocol"]["weights"] == "raw"],
        "training": [{"step": p["step"], **p["metrics"]} for p in done],
        "experiment": experiment,
        "seconds": {"train": trained, **json.loads((run / "timings.json").read_text())},
        "spent": json.loads((run / "spent.json").read_text()),
        "sweep": json.loads((sweep / "leaderboard.json").read_text()),
        "full_network": {
            f"{row['case']}": row["value"]
            for row in bench["benchmarks"]["unet"]["rows"] + bench["benchmarks"]["sampling"]["rows"]
            if row["contender"] in ("ddpm bf16 channels_last", "ddpm fp32 channels_last")
        },
        "machine": bench["machine"],
    }  # fmt: skip


def linear_denoiser(data: Path, counts: set[int]) -> dict[str, dict[str, float]]:
    """Rate and RMSE of the best linear denoiser of the test set on its first so many images, for each of `counts`.

    Closed form: the expectation over the noise, nothing clipped, fixedlarge. Over all images it is paper.LMMSE.
    """
    x = from_uint8(torch.from_numpy(tars.load_images(data, "test")[0])).flatten(1).double()
    centred = x - x.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    tables = Diffusion().tables
    signal, noise = tables["alpha_bar"][:, None], tables["one_minus_alpha_bar"][:, None]
    total = signal * values.clamp(min=0) + noise
    small, large = tables["log_fixedsmall"], tables["log_fixedlarge"]
    found = {}
    for count in sorted(counts):
        spread = ((centred[:count] @ vectors) ** 2).mean(dim=0)
        mse = ((noise / total) ** 2 * spread + signal * (values / total) ** 2 * noise).mean(dim=1)
        terms = tables["posterior_coef_x_0"] ** 2 * torch.exp(-large) / 2 * mse
        terms += 0.5 * (large - small + torch.exp(small - large) - 1)
        rate = float(terms[1:].sum()) / math.log(2)
        found[str(count)] = {"rate_bpd": rate, "rmse": 127.5 * float(mse[0]) ** 0.5}
    return found


def page(found: dict[str, Any]) -> str:
    scores, protocol, train = found["scores"], found["protocol"], found["experiment"]["train"]
    last, sizes = protocol["checkpoint"], found["experiment"]["model"]
    points = found["reference_points"]
    seen, rate = last * train["batch_size"], median(p["train/images_per_second"] for p in found["training"])
    line = found["linear"][str(protocol["nll_images"])]
    useful = all(scores[key] < line[key] for key in line)
    first = (
        f"After {last:,} steps on two CPU cores the network beats the best linear denoiser, which needs no training"
        if useful
        else "**Not yet useful**: the best linear denoiser, which needs no training, is not beaten"
    )
    beside = [
        [NAMES[key], f"{scores[key]:.4f}", f"{PAPER[key]}", f"{scores[key] - PAPER[key]:+.2f}" if key in BOUND else "–",
         f"{line[key]:.4f}" if key in line else "–"]
        for key in PAPER
    ]  # fmt: skip
    at_n = [
        [name, f"{one['fid']:.2f}", f"{one['is_mean']:.2f} ± {one['is_std']:.2f}", f"{one.get('n', protocol['n']):,}"]
        for name, one in [("this run", scores), *points.items()]
        if "fid" in one
    ]  # fmt: skip
    few = found["along"][0]["images"]
    along = [[f"{row['step']:,}", *bound_of(row)] for row in found["along"]]
    along += [[f"{last:,}, raw weights", *bound_of(raw)] for raw in found["raw"]]
    along += [["best linear denoiser", *bound_of(found["linear"][str(few)])]]
    table_4 = []
    for k in sorted(TABLE_4):
        ours, its = found["rate_distortion"][k - 1], TABLE_4[k]
        table_4.append(
            [f"{k:,}", f"{ours['rate_bpd']:.5f}", f"{its[0]:.5f}", f"{ours['rmse']:.3f}", f"{its[1]:.3f}"]
        )
    sweep = [
        [str(row["rank"]), *map(str, row["swept"].values()), *bound_of(row["scores"])]
        for row in found["sweep"]["trials"]
    ]
    minutes = {stage: f"{seconds / 60:.1f}" for stage, seconds in found["seconds"].items()}
    full = found["full_network"]
    train_rate = max(value for case, value in full.items() if case.startswith("train"))
    sample_rate = max(value for case, value in full.items() if "steps" in case)
    forward_rate = max(value for case, value in full.items() if case.startswith("forward"))
    made = found["experiment"]["made_with"]
    commit, machine = made["commit"], found["machine"]
    return f"""# CIFAR-10, measured

{first}
(rate {scores["rate_bpd"]:.4f} against {line["rate_bpd"]:.4f}, RMSE {scores["rmse"]:.4f} against {line["rmse"]:.4f},
on the same {protocol["nll_images"]} test images; over all {TEST_IMAGES:,} the line is at
{LMMSE["rate_bpd"]} and {LMMSE["rmse"]}). It is far from the paper all the same: it has seen {seen:,} images, the
paper's {STEPS * BATCH:,}.

No GPU was at hand. `conf/cifar10_small.yaml` is the paper's network at half its width ({sizes["channels"]} channels),
without dropout, in bf16, trained for {last:,} steps of {train["batch_size"]} images at {rate:.0f} images/s (median).
[cifar10.json](cifar10.json) holds every number of this page; `docs/results/make.py` wrote both from the run's files.

## Beside the paper

{table(["", "this run", "paper", "difference, across protocols", "best linear denoiser, same images"], beside)}

Protocol: EMA weights of step {last:,}; NLL of {protocol["nll_images"]} of {TEST_IMAGES:,} test images over all 1,000
steps ({protocol["nll_precision"]}); FID and IS of {protocol["n"]:,} samples ({protocol["steps"]} DDIM steps,
{protocol["precision"]}) against the training images, in the features of a small classifier, not Inception: **not
comparable with the paper's** ({"; ".join(protocol["why_not"])}). At equal n and in the same features:

{table(["", "FID", "IS", "images"], at_n)}

## As training went on

![Training loss, and the rate of the test images, against steps](../pictures/cifar10-curves.svg)

NLL of the same {few} test images each time, too few for a level, enough for a course:

{table(["step", "NLL", "rate", "distortion", "RMSE"], along)}

## Rate and distortion

{table(["reverse steps", "rate, bits/dim", "paper, Table 4", "RMSE", "paper"], table_4)}

![Rate and distortion along the reverse process](../pictures/{name_of("rate_distortion")})

## Pictures

The first samples, not selected. They are noise, and their FID is above a Gaussian's, because of the sampler: DDIM with
eta 0 carries what an unfinished network gets wrong to the end. `cifar10_small` now samples by ancestral steps
([short-runs.md](short-runs.md)); this checkpoint is gone, so these stay as they were drawn:

![Samples](../pictures/{name_of("samples")})

Progressive generation (Fig. 6):

![The estimate of x_0 along the reverse process](../pictures/{name_of("progressive")})

Interpolation (Fig. 8):

![Interpolation between test images](../pictures/{name_of("interpolation")})

## Schedules and dropout

Seven networks of a quarter of the paper's width, {found["sweep"]["trials"][0]["step"]:,} steps of 16 images each,
ranked by the NLL of the same 12 test images; the loss cannot be compared over schedules, the NLL can.

![Parallel coordinates: schedule, dropout, rate, distortion, NLL](../pictures/cifar10-sweep.svg)

{table(["rank", "schedule", "dropout", "NLL", "rate", "distortion", "RMSE"], sweep)}

{sweep_says(found["sweep"]["trials"])}

## Commands

```
ddpm run cifar10_small data.path=FOLDER_OR_ARCHIVE cluster.workers=0 evaluate.nll_images=64 \\
    evaluate.nll_timesteps=null
ddpm evaluate cifar10_small data.path=FOLDER_OR_ARCHIVE cluster.workers=0 evaluate.metrics=[nll] \\
    evaluate.nll_images=8 evaluate.nll_timesteps=null train.steps=1000   # and 2000, ...; or sample.weights=raw
ddpm sweep cifar10_tiny data.path=FOLDER_OR_ARCHIVE evaluate.nll_images=12 evaluate.nll_timesteps=null
make bench ARGS='unet sampling'      # the rates of the projection; measured at the first batch only
python docs/results/make.py runs/cifar10_small-KEY runs/sweeps/cifar10_tiny benchmarks.json
```

Trained by commit `{TRAINED_BY}`, whose convolutions are plain. Sampled and scored by later ones, some with changes to
documents that were not committed yet (`+`): a run's files name the commit of its last command alone, here
`{commit[:12]}{"+" * commit.endswith("+")}`. On {machine["cpu"]}, {machine["cores"]} cores, torch
{made["versions"]["torch"]}. Minutes of its stages, other work running beside some of them:
{", ".join(f"{stage} {value}" for stage, value in minutes.items())}.

## The paper's run on this machine, projected

From the measured rates of the full network (35.7 M parameters, two cores), not run:

{table(["", "measured", "full run", "projected"], [
    ["training", f"{train_rate:.1f} images/s", f"{STEPS:,} steps of {BATCH}", days(STEPS * BATCH / train_rate)],
    ["sampling", f"{sample_rate:.4f} images/s of 1,000 steps", f"{SAMPLES:,} images", days(SAMPLES / sample_rate)],
    ["NLL", f"{forward_rate:.1f} forward passes/s", f"{TEST_IMAGES:,} images", days(TEST_IMAGES * 1000 / forward_rate)],
])}

On a GPU one command does it all: `ddpm run cifar10_short data.path=FOLDER cluster.workers=0 train.compile=true
sample.compile=true` trains 30,000 steps of the full network, samples and scores; without the Inception weights add
`evaluate.features=classifier`.
"""  # fmt: skip


def sweep_says(trials: list[dict[str, Any]]) -> str:
    nll = {tuple(row["swept"].values()): row["scores"]["nll_bpd"] for row in trials}
    base = nll["linear", 0.1]
    return SWEEP_SAYS.format(
        cosine=base - nll["cosine", 0.1], quad=base - nll["quad", 0.1],
        to_02=nll["linear", 0.2] - base, to_04=nll["linear", 0.4] - base,
    )  # fmt: skip


def bound_of(scores: dict[str, float]) -> list[str]:
    return [f"{scores[key]:.4f}" if key in scores else "–" for key in BOUND]


def days(seconds: float) -> str:
    return f"{seconds / 86_400:,.0f} days"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name_of(figure: str) -> str:
    return next(PICTURES.glob(f"cifar10-{figure}.*")).name


def draw_curves(found: dict[str, Any]) -> None:
    plt.rcParams["svg.hashsalt"] = "cifar10"  # equal bytes for equal numbers
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps, losses = zip(*((p["step"], p["train/loss"]) for p in found["training"]), strict=True)
    left.plot(steps, losses, linewidth=1)
    left.set(xlabel="step", ylabel="training loss, mean of 50 steps", yscale="log")
    along = found["along"]
    right.plot(
        [row["step"] for row in along], [row["rate_bpd"] for row in along], marker="o", label="this run"
    )
    line = found["linear"][str(along[0]["images"])]["rate_bpd"]
    right.axhline(line, color="grey", linestyle="--", label="best linear denoiser")
    right.axhline(TABLE_4[1000][0], color="green", linestyle=":", label="paper, 800,000 steps")
    right.set(xlabel="step", ylabel="rate, bits/dim")
    right.legend(loc="lower left", bbox_to_anchor=(0.0, 0.08))
    figure.savefig(PICTURES / "cifar10-curves.svg", metadata={"Date": None})


def draw_sweep(trials: list[dict[str, Any]]) -> None:
    """A line for each trial through one axis for each of its values."""
    axes = {
        "schedule": [row["swept"]["diffusion.beta_schedule"] for row in trials],
        "dropout": [row["swept"]["model.dropout"] for row in trials],
        **{name: [row["scores"][key] for row in trials]
           for name, key in (("rate", "rate_bpd"), ("distortion", "distortion_bpd"), ("NLL", "nll_bpd"))},
    }  # fmt: skip
    figure, plot = plt.subplots(figsize=(9, 3.6), layout="constrained")
    heights = []
    for place, values in enumerate(axes.values()):
        known = sorted(set(values))
        if isinstance(values[0], str):
            heights.append([known.index(value) / max(1, len(known) - 1) for value in values])
        else:
            heights.append([(value - known[0]) / ((known[-1] - known[0]) or 1) for value in values])
        named = known if len(known) < 5 else known[:: len(known) - 1]
        for value in named:
            height = heights[-1][values.index(value)]
            text = value if isinstance(value, str) else f"{value:.4g}"
            plot.text(
                place + 0.02,
                height,
                text,
                fontsize=8,
                va="center",
                bbox={"fc": "white", "ec": "none", "pad": 1},
            )
    colours = plt.get_cmap("viridis")
    for number, line in enumerate(zip(*heights, strict=True)):
        plot.plot(range(len(axes)), line, color=colours(number / len(trials)), linewidth=2)
    plot.set_xticks(range(len(axes)), list(axes))
    plot.set_yticks([])
    plot.grid(axis="x")
    for side in plot.spines.values():
        side.set_visible(False)
    figure.savefig(PICTURES / "cifar10-sweep.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""The numbers of Ho, Jain and Abbeel 2020 (arXiv 2006.11239v2) as the paper prints them, and published FIDs by step."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddpm.config import DiffusionConfig
from pipeline.config import to_dict
from pipeline.scores.metrics import FIRM, METRICS, Metric, format_number

COLUMNS = [METRICS[name] for name in ("fid", "fid_test", "is_mean", "nll_bpd")]


@dataclass(frozen=True)
class PaperRow:
    """One row of Tables 1 and 2: its name, and {score: as printed}.

    FID is against the training set, `fid_test` against the test set; no scores = unstable in training, "out of
    range" scores, which the paper prints as a dash.
    """

    name: str
    scores: dict[str, str]

    def format_score(self, metric: Metric) -> str:
        return self.scores.get(metric.name, "–").replace(" ", FIRM)

    def format_difference(self, scores: Mapping[str, Any], metric: Metric) -> str:
        """Return a run's score minus the paper's, with sign and the run's error; a dash if one of them is missing."""
        printed = re.search(r"\d+\.\d+", self.format_score(metric))
        if printed is None or metric.name not in scores:
            return "–"
        difference, error = scores[metric.name] - float(printed[0]), scores.get(f"{metric.name}_se")
        return format_number(difference, error, 2, "+").replace("-", "−")


# Tables 1 and 2, by predicted value, loss and variance: CIFAR-10, 50,000 samples, NLL in bits/dim. The third row of
# each half is the unweighted mean square error, which for eps is L_simple.
TABLES_1_AND_2 = {
    ("mean", "vlb", "learned"): PaperRow("μ̃, L, learned diagonal Σ", {"fid": "23.69", "is_mean": "7.28 ± 0.10"}),
    ("mean", "vlb", "fixed"): PaperRow("μ̃, L, fixed isotropic Σ", {"fid": "13.22", "is_mean": "8.06 ± 0.09"}),
    ("mean", "simple", "fixed"): PaperRow("μ̃, unweighted MSE", {}),
    ("eps", "vlb", "learned"): PaperRow("ε, L, learned diagonal Σ", {}),
    ("eps", "vlb", "fixed"): PaperRow("ε, L, fixed isotropic Σ",
        {"fid": "13.51", "is_mean": "7.67 ± 0.13", "nll_bpd": "≤ 3.70", "train_nll_bpd": "≤ 3.69"}),
    ("eps", "simple", "fixed"): PaperRow("ε, L_simple",
        {"fid": "3.17", "fid_test": "5.24", "is_mean": "9.46 ± 0.11", "nll_bpd": "≤ 3.75", "train_nll_bpd": "≤ 3.72"}),
}  # fmt: skip


def find_paper_row(diffusion: DiffusionConfig) -> PaperRow | None:
    """Find the row of an objective; None if the paper has none."""
    variance = "fixed" if diffusion.variance.startswith("fixed") else diffusion.variance
    return TABLES_1_AND_2.get((diffusion.predict, diffusion.loss, variance))


# App. B and the authors' code: what its rows of CIFAR-10 share, whatever the objective.
RECIPE: dict[str, dict[str, Any]] = {
    "diffusion": {
        "timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "betas": [],
        "t_sampling": "uniform",
    },
    "model": {
        "name": "unet", "channels": 128, "channel_mult": [1, 2, 2, 2], "num_res_blocks": 2,
        "attention_resolutions": [16], "dropout": 0.1, "norm_groups": 32, "resample": "conv",
    },
    "train": {
        "steps": 800_000, "batch_size": 128, "random_flip": True, "lr": 2e-4, "lr_decay": "none",
        "warmup_steps": 5000, "grad_clip": 1.0, "ema_decay": [0.9999], "ema_warmup": False, "precision": "fp32",
    },
}  # fmt: skip


def has_paper_schedule(diffusion: DiffusionConfig) -> bool:
    """Return whether x_t is as noisy at each t as in the paper."""
    ours, keys = to_dict(diffusion), ("timesteps", "beta_schedule", "beta_start", "beta_end", "betas")
    return all(ours[key] == RECIPE["diffusion"][key] for key in keys)


# Table 4: {k = T - t + 1: (rate in bits/dim, RMSE on the scale 0 to 255)}, CIFAR-10, test set, L_simple.
TABLE_4 = {
    1000: (1.77581, 0.95136), 900: (0.11994, 12.02277), 800: (0.05415, 18.47482), 700: (0.02866, 24.43656),
    600: (0.01507, 30.80948), 500: (0.00716, 38.03236), 400: (0.00282, 46.12765), 300: (0.00081, 54.18826),
    200: (0.00013, 60.97170), 100: (0.00000, 67.60125),
}  # fmt: skip

# The best linear denoiser of CIFAR-10's test set (its mean and covariance, nothing trained), at the end of the
# chain: rate in bits/dim with fixedlarge, RMSE on the scale 0 to 255. From the closed form, not from the paper.
LMMSE = {"rate_bpd": 2.4528, "rmse": 1.1035}

# FID against training steps: tqch/ddpm-torch, batch 128, EMA with warm-up, 50,000 samples.
PUBLISHED_FIDS = {46_800: 9.16, 93_600: 5.78, 187_200: 4.08, 421_000: 3.31, 796_000: 3.19}

"""The order of runs: alike with alike, the mean over seeds, equals, and the registry behind it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from pipeline.scores.metrics import METRICS, find_metric
from pipeline.scores.ranking import describe_best, rank_runs

FID = METRICS["fid"]


@dataclass(frozen=True)
class Place:
    label: str
    swept: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    data: str = "digits"


def run(lr: float, seed: int, fid: float | None, n: int = 64, data: str = "digits") -> Place:
    scores = {} if fid is None else {"fid": fid}
    return Place(
        f"lr={lr} seed={seed}", {"lr": lr, "seed": seed}, scores, {"n": n, "sampler": str(seed)}, data
    )


def ranks(runs: list[Place], metric=FID) -> list[list[tuple[str, int]]]:
    return [[(one.label, at.rank) for one, at in group.ranked] for group in rank_runs(runs, metric)]


def test_seeds_count_together_and_their_spread_is_kept():
    runs = [run(1, 0, 10.0), run(1, 1, 40.0), run(2, 0, 20.0), run(2, 1, 24.0), run(3, 0, None)]
    (group,) = rank_runs(runs, FID)
    assert [(one.label, at.rank, at.mean, at.seeds) for one, at in group.ranked] == [
        ("lr=2 seed=0", 1, 22.0, 2), ("lr=2 seed=1", 1, 22.0, 2), ("lr=1 seed=0", 2, 25.0, 2),
        ("lr=1 seed=1", 2, 25.0, 2),
    ]  # fmt: skip
    assert group.ranked[0][1].spread == pytest.approx(8**0.5)
    said = describe_best([group], FID).replace("\u00a0", " ")
    assert said == "lr=2 has the lowest FID of 2: 22.00 ± 2.83, mean of 2 seeds"


def test_equals_share_a_rank_whatever_the_order_they_come_in():
    runs = [run(2, 0, 5.0), run(1, 0, 5.0), run(3, 0, 6.0)]
    assert ranks(runs) == ranks(runs[::-1]) == [[("lr=1 seed=0", 1), ("lr=2 seed=0", 1), ("lr=3 seed=0", 3)]]
    said = describe_best(rank_runs(runs, FID), FID)
    assert said.startswith("lr=1 seed=0 and lr=2 seed=0 have the lowest FID of 3")


def test_the_direction_is_the_metrics():
    runs = [Place("a", {"x": 1}, {"is_mean": 1.0}), Place("b", {"x": 2}, {"is_mean": 2.0})]
    assert ranks(runs, METRICS["is_mean"]) == [[("b", 1), ("a", 2)]]
    assert ranks(runs, replace(METRICS["is_mean"], larger_is_better=False)) == [[("a", 1), ("b", 2)]]


def test_other_images_and_other_protocols_are_groups_of_their_own():
    runs = [run(1, 0, 9.0), run(2, 0, 8.0), run(3, 0, 1.0, n=9), run(4, 0, 2.0, data="cifar10")]
    assert [len(group.ranked) for group in rank_runs(runs, FID)] == [2, 1, 1]
    assert "scored by 3 protocols" in describe_best(rank_runs(runs, FID), FID)
    assert "No run has a score of FID" in describe_best([], FID)


def test_a_metric_is_found_by_its_name_or_its_family():
    assert [find_metric(word) for word in ("is", "kid_mean", "nope")] == [
        METRICS["is_mean"], METRICS["kid_mean"], None
    ]  # fmt: skip

"""docs/cluster.md: its computed figures are those of the code."""

import re

import pytest
from compose_file import ROOT

from benchmarks.scaling_model import PROJECTED, allreduce_seconds, project
from pipeline.config import load_experiment
from pipeline.engine.preflight import GIB, estimate_requirements

PAGE = (ROOT / "docs" / "cluster.md").read_text()


def cells(first: str) -> list[str]:
    (row,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", PAGE, re.M)
    return [cell.strip() for cell in row.split("|")]


def test_the_all_reduce_of_a_ring():
    assert allreduce_seconds(1, 143e6, 1e9, 1e-3) == 0
    assert allreduce_seconds(2, 143e6, 1e9, 0) == pytest.approx(0.143)  # each half once out and once back
    assert allreduce_seconds(64, 143e6, 1e9, 0) == pytest.approx(0.286, rel=0.02)
    assert allreduce_seconds(4, 0, 1e9, 1e-3) == pytest.approx(6e-3)


@pytest.mark.parametrize("network", PROJECTED)
def test_projected_efficiencies_are_the_model_s(network):
    step, gradients = PROJECTED[network]
    ranges = [project(n, step, gradients) for n in map(int, cells("GPUs"))]
    shown = [f"{100 * low:.0f}-{high:.0%}" if low < high else f"{low:.0%}" for low, high in ranges]
    assert [cell.replace(" %", "%") for cell in cells(network)] == shown


def test_sizes_are_those_that_a_run_prints():
    for i, name in enumerate(("cifar10", "lsun_church", "lsun_bedroom_large")):
        experiment = load_experiment(name, ["evaluate.checkpoints=null", "sample.checkpoint=last"])
        wanted = estimate_requirements(experiment)
        one = wanted.checkpoints / (wanted.checkpoint_count + 1) / GIB
        for row, size in (
            ("one checkpoint (weights, Adam, EMA twice)", one),
            ("memory of a training worker, without images and activations", wanted.memory / GIB),
            (f"{wanted.checkpoint_count} checkpoints and one being written", wanted.checkpoints / GIB),
            (f"{wanted.images:,} samples, at most", wanted.samples / GIB),
            ("features of samples, real images and baselines", wanted.features / GIB),
        ):
            shown = cells(row)[i].removesuffix(" GiB")
            rounding = 0.51 * 10 ** -len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(size, abs=rounding), (row, name)

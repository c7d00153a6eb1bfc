"""The benchmarks' harness on tiny shapes: everything runs and is said; no time is asserted."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import sampling, subjects, unet
from benchmarks.floor import floor_of
from benchmarks.harness import Settings
from ddpm import UNetConfig
from ddpm.networks.unet import UNet

SETTINGS = Settings(torch.device("cpu"), quick=True, rounds=3)
TINY = UNetConfig(channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(subjects, "PAPER", TINY)
    monkeypatch.setattr(unet, "batches", lambda _: (2,))
    monkeypatch.setattr(sampling, "_size", lambda _: (2, 2))


def test_the_floor_repeats_every_product_of_a_training_step():
    net, x, t = UNet(TINY, 32, 3, 3), torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    step = lambda: net(x, t).sum().backward()  # noqa: E731
    ours, floor = products_of(step), products_of(floor_of(step))
    assert ours == floor and ours["aten::convolution_backward"] > 10 and ours["aten::addmm"] > 5


def products_of(call):
    names = ("aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm")
    with torch.profiler.profile() as profile:
        call()
    return {event.key: event.count for event in profile.key_averages() if event.key in names}


def test_the_command_prints_its_table_last_and_writes_json(tiny, tmp_path, capsys):
    words = "unet sampling --quick --rounds 1 --threads 1 --device cpu --clock cpu --json"
    command.main([*words.split(), str(tmp_path / "found.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(("sampling", "unet"))
    content = json.loads((tmp_path / "found.json").read_text())
    names = {row["contender"] for row in content["benchmarks"]["unet"]["rows"]}
    assert {"ddpm fp32 channels_last", "ddpm bf16 channels_last", "diffusers default fp32"} <= names
    assert "floor: products alone" in names
    skipped = [reason for one in content["benchmarks"].values() for reason in one["skipped"]]
    assert all("not installed" in reason for reason in skipped)
    assert content["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]

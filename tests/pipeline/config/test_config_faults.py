"""What a user types or writes into a configuration is taken as typed, or refused in a line with what is expected."""

import re
from functools import reduce

import pytest

from pipeline import config
from pipeline.cli.program import main
from pipeline.errors import ConfigError
from pipeline.sweep.definition import load_sweep
from pipeline.sweep.points import format_overrides, list_points

TEXTS = [
    "/data/a #1", "2024_01", "1e5", "off", "/data/a: b", "/[x]", "/@x", "/%x", "007", "yes", "1:30", "~x", "*a", "'a",
    '"a"b"', "{a", "Null", "a\nb", "???", "/d/${HOME}", "${oc.env:NOPE}", "${", "a=b", "100000000000000000000000",
]  # fmt: skip


@pytest.mark.parametrize("typed", TEXTS)
def test_a_text_is_taken_as_typed_and_comes_back(typed, tmp_path):
    cluster = config.load_cluster("local", [f"storage={typed}"])
    assert cluster.storage == typed
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml(cluster))
    assert config.load_cluster(str(path), []) == cluster
    assert config.load_experiment("cifar10", [f"data.path=/a{typed}"]).data.path == f"/a{typed}"


VALUES = [
    ("train.steps=1e4", 10_000), ("train.steps=1e3", 1000), ("seed=010", 10), ("seed=0x10", 16), ("seed=0o10", 8),
    ("train.lr=1e-4", 1e-4), ("train.lr=.5", 0.5), ("model.dropout=0", 0.0), ("name=null", "null"),
    ("name=1e5", "1e5"), ("name=on", "on"), ("name='a'", "a"), ("data.path=null", None),
    ("sample.label=null", None), ("train.random_flip=true", True), ("train.ema_decay=0.9", (0.9,)),
    ("evaluate.metrics=[fid, nll]", ("fid", "nll")),
]  # fmt: skip


@pytest.mark.parametrize(("word", "value"), VALUES)
def test_a_value_is_read_by_the_type_of_its_key(word, value, tmp_path):
    key, _, text = word.partition("=")

    def find_value(experiment: config.Experiment) -> object:
        return reduce(getattr, key.split("."), experiment)

    experiment = config.load_experiment("cifar10_short", [word])
    assert find_value(experiment) == value and type(find_value(experiment)) is type(value)
    path = tmp_path / "mine.yaml"
    path.write_text(config.to_yaml(experiment))
    assert config.load_experiment(str(path), []) == experiment
    section, _, name = key.rpartition(".")
    line = f"{name}: {text}" if word != "name=null" else "name: 'null'"  # in a file, a plain null is null
    path.write_text(f"base: cifar10_short\n{f'{section}: {{{line}}}' if section else line}\n")
    assert find_value(config.load_experiment(str(path), [])) == value


REFUSED = [
    ("seed=1:30", "whole number"), ("seed=1_000", "whole number"), ("seed=${seed}", "whole number"),
    ("seed=1.5", "whole number"), ("seed=", "empty"), ("seed=" + "9" * 5000, "whole number"),
    ("seed=1e18446744", "whole"), ("data.path=", "empty"), ("data.path=\0", "text"), ("model.name=[unet]", "unet"),
    ("model.name={a: 1}", "unet"), ("model.name=null", "unet"), ("model=5", "section"), ("data.path.x=5", "text"),
    ("a.b.c=1", "unknown"), ("sample.checkpoint=²", "whole number"), ("sample.label=²", "whole number"),
    ("sample.guidance_scale=nan", "number"), ("sample.guidance_scale=.inf", "number"), ("train.lr=inf", "number"),
    ("train.lr=1e400", "number"), ("train.steps=1" + "0" * 21, "at most"),
    ("diffusion.timesteps=10000000000", "at most"), ("train.batch_size=1000000000", "GiB"),
    ("model.channels=1000000000", "at most"), ("data.labels=1e9", "at most"),
    ("model.num_res_blocks=1000000", "at most"), ("data.image_size=1e9", "at most"),
    ("train.warmup_steps=1e30", "at most"), ("model.channel_mult=1,2", r"\[1,2\]"),
    ("evaluate.metrics=fid,is", r"\[fid,is\]"), ("evaluate.metrics=[]", "fid"),
    ("evaluate.metrics=[fid,fid]", "twice"), ("figures.which=[samples,samples]", "twice"), ("name=data", "folder"),
    ("name=" + "a" * 250, "up to 100"), ("train.ema_decay=[0.9", r"\]"), ("data.source=[digits]", "one of"),
    ("seed=!!map [a]", "unpack"),
    ("cluster.image_memory=nan", "number"), ("cluster.image_memory=.inf", "number"), ("cluster.storage=", "empty"),
    ("cluster.workers=99999999999999999999", "at most"), ("cluster.gpus_per_task=.inf", "number"),
    ("cluster.retries=1e30", "at most"), ("cluster.tracking_uri=", "empty"),
    ("cluster.cpus_per_task=1e300", "at most"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "expected"), REFUSED)
def test_what_no_machine_can_hold_or_means_nothing_is_refused_by_show(word, expected, capsys):
    assert main(["show", "digits", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {word.partition('=')[0].split('.')[0]}") and len(line) < 500
    assert re.search(expected, line)


FILES = [
    ("base: [digits]", "base"), ("base: {a: 1}", "base"), ("base: 5", "named '5'"), ("base: digits\nseed: ???", "seed"),
    ("base: digits\nseed: ${oc.env:HOME}", "seed"), ("base: digits\nseed: 1\nseed: 2", "seed"), ("- a", "no keys"),
    ("base: digits\ndata: ???", "data"), ("a: &a [x]\nb: [*a, *a]", "alias"), ("a: !!python/name:os.system x", "tag"),
    ("base: digits\n? [a]\n: 1", "unhashable"), ("seed: !!binary aGk=", "tag"), ("a: [" * 3000, "yaml"), ("\0", "yaml"),
    ("a: 1\n" * 300_000, "larger"), ("base: digits\nname:", "name is null"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_a_file_that_means_nothing_is_refused_in_a_line(text, expected, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert main(["show", str(path)]) == 2
    assert expected in capsys.readouterr().err
    for words in (["show", "digits", "--cluster"], ["submit", "--", "sweep"], ["submit", "--", "run"]):
        assert main([*words, str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) <= 10


def test_values_of_a_sweep_are_read_by_the_types_of_their_keys(tmp_path):
    path = tmp_path / "mine.yaml"
    space = "{data.path: [2024_01, 1e5], train.lr: [1e-3], model.channel_mult: [[1, 2]]}"
    start = f"experiment: cifar10_short\nspace: {space}\n"
    path.write_text(f"{start}overrides: {{train.steps: 1e3, data.path: a}}\n")
    with pytest.raises(ConfigError, match=r"data\.path is overridden too"):
        load_sweep(str(path), [])
    path.write_text(f"{start}overrides: {{train: {{steps: 1e3}}}}\n")
    sweep = load_sweep(str(path), ["draw.method=grid"])
    expected = {"data.path": ["2024_01", "1e5"], "train.lr": [1e-3], "model.channel_mult": [[1, 2]]}
    assert sweep.space == expected
    assert format_overrides(sweep.overrides) == ["train.steps=1000.0"]
    first, second = (point.experiment for point in list_points(sweep, []))
    assert (first.train.steps, first.train.lr, first.model.channel_mult) == (1000, 1e-3, (1, 2))
    assert second.data.path.endswith("/1e5")

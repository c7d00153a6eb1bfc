"""Configuration: every file loads, what is typed is taken as typed or refused."""

import dataclasses
import re
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from ddpm.config import TrainConfig
from ddpm.diffusion import Diffusion
from ddpm.networks.config import UNetConfig
from pipeline import config
from pipeline.cli.program import main
from pipeline.engine.names import list_known_names
from pipeline.errors import ConfigError
from pipeline.store import checkpoint
from pipeline.sweep.definition import load_sweep
from pipeline.sweep.points import format_overrides, list_points

EXPERIMENTS = [path.stem for path in (ROOT / "conf").glob("*.yaml")]
PAPER, WITH_VARIANCE = 35_746_307, 35_749_766
COUNTS = {  # the paper (App. B) has 35.7 million for CIFAR-10, 114 for 256 pixels, 256 for the large one
    PAPER: "cifar10 cifar10_cosine cifar10_published cifar10_short cifar10_simple_mean cifar10_vlb_eps_fixed "
    "cifar10_vlb_mean_fixed",
    WITH_VARIANCE: "cifar10_cosine_hybrid cifar10_cosine_vlb cifar10_linear_hybrid cifar10_vlb_eps_learned "
    "cifar10_vlb_mean_learned",
    PAPER + 10 * 512: "cifar10_classes",  # an embedding of the label, as wide as that of the time
    113_673_219: "celebahq256 lsun_bedroom lsun_cat lsun_church", 255_677_955: "lsun_bedroom_large",
    8_952_067: "cifar10_small folder", 701_345: "digits", 1_053_249: "context_digits",
    # Source documents: 000 without the parts that it never uses, 001 in its right form, 002
    168_898_883: "unet_annotated", 1_481_027: "context_sprites", 14_553_731: "mha64",
}  # fmt: skip
PARAMETERS = {name: count for count, names in COUNTS.items() for name in names.split()}


def problems(name: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load_experiment(name, list(overrides), list_known_names())
    return caught.value.problems


@pytest.mark.parametrize("name", sorted({*EXPERIMENTS, *PARAMETERS}))
def test_every_experiment_loads_and_has_its_parameter_count(name):
    net = checkpoint.create_network(config.load_experiment(name, []), torch.device("meta"))
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "steps", "flips"), [
    ("celebahq256", 500_000, True), ("lsun_church", 1_200_000, True), ("lsun_cat", 1_800_000, True),
    ("lsun_bedroom", 2_400_000, False), ("lsun_bedroom_large", 1_150_000, False),
])  # fmt: skip
def test_256_pixels_are_the_papers(name, steps, flips):
    experiment = config.load_experiment(name, [])
    train = experiment.train
    assert (train.steps, train.random_flip, train.batch_size, train.lr) == (steps, flips, 64, 2e-5)
    assert (experiment.model.dropout, experiment.diffusion.variance) == (0.0, "fixedsmall")
    assert (experiment.data.image_size, experiment.data.labels) == (256, 0)


def test_every_cluster_loads_and_a_tracking_uri_that_mlflow_does_not_know_is_refused():
    for path in (ROOT / "conf" / "cluster").glob("*.yaml"):
        assert config.load_cluster(path.stem, []).storage
    wrong = "foo://host mlruns http:/host host:5000 sqlite:// sqlite:/// sqlite:///:memory: http:// "
    wrong += "http:///x https://:5000 http://me:pw@ http://h:99999 http://h:x http://[::1 postgresql://"
    for uri in wrong.split():
        with pytest.raises(ConfigError, match=r"cluster\.tracking_uri .*(http|sqlite|postgresql)s?://"):
            config.load_cluster("local", [f"tracking_uri={uri}"])
    right = "http://host:5000 sqlite:////data/m.db postgresql+psycopg2://db/x postgresql:///x http://[::1]:5"
    for known in right.split():
        assert config.load_cluster("local", [f"tracking_uri={known}"]).tracking_uri == known


def test_cifar10_is_the_paper():
    """The yaml and the defaults of the library both say the paper's values: they must agree."""
    experiment = config.load_experiment("cifar10", [])
    train, evaluate = experiment.train, experiment.evaluate
    assert (experiment.model, experiment.diffusion) == (UNetConfig(), Diffusion().config)
    assert vars(TrainConfig()).items() <= vars(train).items()
    assert (train.lr, train.warmup_steps, train.ema_decay) == (2e-4, 5000, (0.9999,))
    assert (evaluate.checkpoints, experiment.sample.checkpoint) == ("every:100000", "best")


@pytest.mark.parametrize(("name", "objective"), [
    ("cifar10_vlb_mean_learned", "mean vlb learned"), ("cifar10_vlb_eps_learned", "eps vlb learned"),
    ("cifar10_vlb_mean_fixed", "mean vlb fixedlarge"), ("cifar10_vlb_eps_fixed", "eps vlb fixedlarge"),
    ("cifar10_simple_mean", "mean simple fixedlarge"), ("cifar10", "eps simple fixedlarge"),
])  # fmt: skip
def test_rows_of_table_2_differ_in_their_objective_alone(name, objective):
    row, paper = config.load_experiment(name, []), config.load_experiment("cifar10", [])
    diffusion = row.diffusion
    assert [diffusion.predict, diffusion.loss, diffusion.variance] == objective.split()
    assert bool(diffusion.list_warnings()) == (name in ("cifar10_vlb_eps_learned", "cifar10_simple_mean"))
    assert dataclasses.replace(row, name=paper.name, diffusion=paper.diffusion) == paper


def test_another_network_takes_no_key_of_the_base_network(tmp_path):
    path = tmp_path / "other.yaml"
    mha = "{name: mha_unet, channels: 32, channel_mult: [1, 2], num_heads: 4, time_width: 32, form: document}"
    path.write_text(f"base: digits\nmodel: {mha}\n")
    assert config.load_experiment(str(path), []).model.channels == 32
    path.write_text("base: digits\nmodel: {name: mha_unet, channels: 32}\n")
    assert "model.num_heads is missing" in problems(str(path))
    path.write_text("base: digits\nmodel: {name: unet, dropout: 0.3}\n")
    assert config.load_experiment(str(path), []).model.dropout == 0.3
    assert "model.time_width is missing" in problems("digits", "model.name=mha_unet")


def test_all_problems_are_reported_at_once_with_suggestions():
    found = problems(
        "digits", "model.dropuot=0.3", "dropout=1", "train.lr=fast", "train.steps=0", "seed=x",
        "evaluate.metrics=[fid,ins]", "data.source=digit", "sample.eta=2", "train.warmup_steps=-1",
        "sample.steps=5000", "diffusion.timesteps=1",
    )  # fmt: skip
    keys = {line.split()[0]: line for line in found}
    assert len(keys) == len(found) == 11 and all("\n" not in line for line in found)
    for key, told in {
        "model.dropuot": "did you mean 'dropout'?", "dropout": "did you mean 'model.dropout'?",
        "train.lr": "'fast'; a number", "seed": "'x'; a whole number", "sample.eta": "at least 0 and at most 1",
        "data.source": "parquet is expected (did you mean 'digits'?)", "evaluate.metrics": "(did you mean 'is'?)",
    }.items():  # fmt: skip
        assert told in keys[key]
    found = problems("digits", "train.lr=fast", "sample.steps=5000", "data.source=digit")
    assert {line.split()[0] for line in found} == {"train.lr", "sample.steps", "data.source"}


LEARNED = "cifar10_vlb_mean_learned"  # which holds for the whole chain
TWO_AVERAGES = "train.ema_decay=[0.999,0.99]"


@pytest.mark.parametrize(("words", "names"), [
    (["sample.steps=2000"], "sample.steps"), (["sample.checkpoint=9999"], "sample.checkpoint"),
    ([LEARNED, "sample.steps=100"], "sample.steps is 100, but .* sample.variance"),
    ([LEARNED, "sample.steps=999"], "sample.steps is 999, but"), (["data.labels=0"], "evaluate.features"),
    (["model.class_conditional=true", "data.labels=0"], "model.class_conditional is true, but data"),
    (["sample.label=cycle"], "sample.label is for networks that take labels .*class_conditional=true"),
    (["model.norm_groups=7"], "model.norm_groups"), (["seed=-1"], "seed"), (["name=../x"], "name"),
    (["model.name=unnet"], "model.name"), (["diffusion.beta_schedule=lienar"], "diffusion.beta_schedule"),
    (["sample.checkpoint=best"], "sample.checkpoint is best; set evaluate.checkpoints"),
    (["sample.checkpoint=bets"], "sample.checkpoint is 'bets'"),
    (["diffusion.beta_schedule=jsd", "diffusion.predict=x0", "sample.spacing=logsnr"], ".*jsd.*quadratic"),
    (["cifar10", "sample.spacing=quadratic"], ".*set sample.steps"),
    (["evaluate.checkpoints=some"], "evaluate.checkpoints is 'some'; use null, all or every:N"),
    (["evaluate.checkpoints=every:0"], "evaluate.checkpoints is 'every:0'"),
    (["evaluate.checkpoints=every:300"], "evaluate.checkpoints is every:300; N is a multiple of"),
    (["evaluate.checkpoints=every:1400"], "evaluate.checkpoints is every:1400; N is a multiple of"),
    (["evaluate.checkpoints=all", "published.weights=ema", "published.path=x"], "evaluate.checkpoints"),
    (["evaluate.nll_timesteps=1001"], "evaluate.nll_timesteps is 1001, more than diffusion.timesteps=1000"),
    (["model.name=exact"], "data.limit is null"),
    (["model.name=exact", "data.limit=9", "diffusion.variance=learned"], "model.name is exact"),
    (["model.name=exact", "data.limit=9", "evaluate.checkpoints=all"], "evaluate.checkpoints is for"),
    ([TWO_AVERAGES, "sample.ema_decay=0.9"], "sample.ema_decay is 0.9"),
    ([TWO_AVERAGES, "sample.ema_decay=0.99", "sample.weights=raw"], ".*sample.weights=ema"),
    (["train.keep_every=300"], "train.keep_every must be a multiple of checkpoint_every=200"),
])  # fmt: skip
def test_nonsense_is_refused_by_name(words, names):
    words = ["digits", *words] if "=" in words[0] else words
    assert any(re.match(names, line) for line in problems(*words))


def test_what_is_allowed_is_not_refused_and_channels_that_are_normalised_alone_are_warned_of():
    for word in ("sample.steps=1000", "sample.sampler=ddim", "sample.variance=fixedsmall"):
        assert config.load_experiment(LEARNED, ["sample.steps=100", word])
    assert config.load_experiment("digits", [TWO_AVERAGES, "sample.ema_decay=0.99"]).ema_number == 1
    experiment = config.load_experiment("cifar10", ["data.path=train"])
    assert (experiment.data.path, experiment.evaluate.reference) == (str(Path("train").absolute()), "train")
    for width, warned in ((32, True), (64, False)):
        found = config.load_experiment("cifar10", [f"model.channels={width}"]).list_warnings()
        assert ["model.norm_groups=32 of 32" in line for line in found] == [True] * warned


def test_betas_of_a_file_are_values_of_the_experiment(tmp_path):
    betas, written = tmp_path / "betas.npy", tmp_path / "experiment.yaml"
    np.save(betas, np.linspace(1e-3, 0.3, 50))
    words = [f"diffusion.betas={betas}", "diffusion.timesteps=50", "sample.steps=50"]
    experiment = config.load_experiment("digits", words)
    assert experiment.diffusion.betas == tuple(np.linspace(1e-3, 0.3, 50))
    assert "diffusion.betas has 50 values; timesteps=1000 needs as many" in problems("digits", words[0])
    written.write_text(config.to_yaml(experiment))
    np.save(betas, np.ones((2, 3), dtype=int))
    assert config.load_experiment(str(written), []).diffusion == experiment.diffusion
    assert "of shape (2, 3)" in problems("digits", *words)[0]
    assert "no .npy file of a schedule" in problems("digits", "diffusion.betas=absent.npy")[0]
    assert config.find_relative_paths("digits", ["diffusion.betas=here.npy"]) == ["diffusion.betas=here.npy"]


@pytest.mark.parametrize("typed", [
    "/data/a #1", "2024_01", "1e5", "off", "/data/a: b", "/[x]", "/@x", "/%x", "007", "yes", "1:30", "~x", "*a", "'a",
    '"a"b"', "{a", "Null", "a\nb", "???", "/d/${HOME}", "${oc.env:NOPE}", "${", "a=b", "100000000000000000000000",
])  # fmt: skip
def test_a_text_is_taken_as_typed_and_comes_back(typed, tmp_path):
    cluster = config.load_cluster("local", [f"storage={typed}"])
    assert cluster.storage == typed
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml(cluster))
    assert config.load_cluster(str(path), []) == cluster
    assert config.load_experiment("cifar10", [f"data.path=/a{typed}"]).data.path == f"/a{typed}"


@pytest.mark.parametrize(("word", "value"), [
    ("train.steps=1e4", 10_000), ("train.steps=1e3", 1000), ("seed=010", 10), ("seed=0x10", 16), ("seed=0o10", 8),
    ("train.lr=1e-4", 1e-4), ("train.lr=.5", 0.5), ("model.dropout=0", 0.0), ("name=null", "null"),
    ("name=1e5", "1e5"), ("name=on", "on"), ("name='a'", "a"), ("data.path=null", None),
    ("sample.label=null", None), ("train.random_flip=true", True), ("train.ema_decay=0.9", (0.9,)),
    ("evaluate.metrics=[fid, nll]", ("fid", "nll")),
])  # fmt: skip
def test_a_value_is_read_by_the_type_of_its_key(word, value, tmp_path):
    key, _, text = word.partition("=")
    find_value, experiment = attrgetter(key), config.load_experiment("cifar10_short", [word])
    assert find_value(experiment) == value and type(find_value(experiment)) is type(value)
    path = tmp_path / "mine.yaml"
    path.write_text(config.to_yaml(experiment))
    assert config.load_experiment(str(path), []) == experiment
    section, _, name = key.rpartition(".")
    line = f"{name}: {text}" if word != "name=null" else "name: 'null'"  # in a file, a plain null is null
    path.write_text(f"base: cifar10_short\n{f'{section}: {{{line}}}' if section else line}\n")
    assert find_value(config.load_experiment(str(path), [])) == value


@pytest.mark.parametrize(("word", "expected"), [
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
])  # fmt: skip
def test_what_no_machine_can_hold_or_means_nothing_is_refused_by_show(word, expected, capsys):
    assert main(["show", "digits", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {word.partition('=')[0].split('.')[0]}") and len(line) < 500
    assert re.search(expected, line)


@pytest.mark.parametrize(("text", "expected"), [
    ("base: [digits]", "base"), ("base: {a: 1}", "base"), ("base: 5", "named '5'"), ("base: digits\nseed: ???", "seed"),
    ("base: digits\nseed: ${oc.env:HOME}", "seed"), ("base: digits\nseed: 1\nseed: 2", "seed"), ("- a", "no keys"),
    ("base: digits\ndata: ???", "data"), ("a: &a [x]\nb: [*a, *a]", "alias"), ("a: !!python/name:os.system x", "tag"),
    ("base: digits\n? [a]\n: 1", "unhashable"), ("seed: !!binary aGk=", "tag"), ("a: [" * 3000, "yaml"), ("\0", "yaml"),
    ("base: mine\n", "leads back"), ("a: 1\n" * 300_000, "larger"), ("base: digits\nname:", "name is null"),
])  # fmt: skip
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

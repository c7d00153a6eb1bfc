"""Published weights: diffusers writes what we read and reads what we write, tensors and pictures compared."""

import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE_CPU, TINY, one_cpu, tiny_experiment
from diffusers import DDPMPipeline, UNet2DModel
from diffusers_unet import make_unet, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from staged import results, run_stage

from ddpm.diffusion import Diffusion
from ddpm.images import to_uint8
from ddpm.networks import NETWORKS
from ddpm.sampler import run_chain
from pipeline import config
from pipeline.cli import arguments
from pipeline.cli.program import main, parse_arguments
from pipeline.engine import find
from pipeline.engine.provenance import write_record
from pipeline.errors import ConfigError, PipelineError
from pipeline.stages import evaluate, train
from pipeline.store import checkpoint, diffusers_layout, keys
from pipeline.store.run import Place, list_steps

LEARNED = ["diffusion.variance=learned_range", "diffusion.loss=hybrid"]
COLOUR = ["data.channels=3", "data.image_size=16"]
SHAPES = {
    "tiny": [],
    "wide": ["model.channels=24", "model.norm_groups=6"],
    "levels": [*COLOUR, "model.channel_mult=[1,3,2]", "model.attention_resolutions=[16,4]"],
    "unattended": [*COLOUR, "model.attention_resolutions=[]", "model.num_res_blocks=2"],
    "learned variance": [*COLOUR, *LEARNED, "model.channel_mult=[1,1,2,2]", "model.norm_groups=2"],
}
STEP = 6  # TINY's train.steps
FILE = "diffusion_pytorch_model"
SHARDS = {"max_shard_size": "20KB"}


def publish(folder: Path, experiment: config.Experiment, pickled: bool = False, **options) -> UNet2DModel:
    """Save diffusers' own network of the experiment's shape."""
    data, out = experiment.data, 2 if experiment.diffusion.variance == "learned_range" else 1
    net = randomise(make_unet(experiment.model, data.image_size, data.channels, data.channels * out))
    net.save_pretrained(folder, safe_serialization=not pickled, **options)
    return net


def importing(folder: Path, *overrides: str, weights: Any = "unknown") -> config.Experiment:
    published = config.PublishedConfig(str(folder), weights)
    return dataclasses.replace(tiny_experiment(*overrides), published=published)


def read(*arguments, **more) -> dict[str, torch.Tensor]:
    return diffusers_layout.read_weights(importing(*arguments, **more))


def assert_refused(message: str, *arguments, error: type = PipelineError, **more) -> None:
    with pytest.raises(error, match=message):
        read(*arguments, **more)


def assert_same_tensors(path: Path, theirs: UNet2DModel) -> None:
    ours = {diffusers_layout.translate_name(name): tensor for name, tensor in read(path).items()}
    torch.testing.assert_close(ours, dict(theirs.state_dict()), rtol=0, atol=0)


def assert_computes_the_same(experiment: config.Experiment, theirs: UNet2DModel) -> None:
    ours = checkpoint.create_network(experiment)
    ours.load_state_dict(diffusers_layout.read_weights(experiment))
    side, generator = experiment.data.image_size, torch.Generator().manual_seed(1)
    x_t = torch.randn(3, experiment.data.channels, side, side, generator=generator)
    t = torch.tensor([0, 7, 999])
    expected = theirs(x_t, t).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.eval()(x_t, t), expected, rtol=1e-5, atol=1e-5)


def rewrite(path: Path, **changes) -> None:
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value != "absent"}))


def trained(root: Path, experiment: config.Experiment) -> tuple[Place, torch.nn.Module]:
    """A run directory whose one checkpoint holds random weights, raw and averaged ones different."""
    run = Place(root, experiment, "data", "key")
    write_record(run, ())
    net = randomise(checkpoint.create_network(experiment))
    raw = net.state_dict()
    state = {f"net.{name}": tensor for name, tensor in raw.items()}
    ema = {name: tensor + 1 for name, tensor in raw.items()}
    checkpoint.save_checkpoint(run.locate_step(STEP), state, ema, STEP)
    return run, net


def older(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "proj_attn"}.items():
        tensors = {re.sub(rf"\.{new}\.", f".{old}.", name): tensor for name, tensor in tensors.items()}
    return tensors


def convolutional(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    matrices = {name: x for name, x in tensors.items() if "attentions" in name and x.ndim == 2}
    return tensors | {name: matrix[:, :, None, None] for name, matrix in matrices.items()}


@pytest.mark.parametrize(("where", "pickled", "rename"), [
    ("", False, dict), ("unet", True, dict), ("unet", False, older), ("", True, convolutional),
    ("", False, lambda tensors: convolutional(older(tensors))),
], ids=["new", "new pickled", "older", "convolutions", "older convolutions"])  # fmt: skip
def test_every_layout_in_the_wild_gives_the_same_tensors(tmp_path, where, pickled, rename):
    theirs = publish(tmp_path / where, tiny_experiment(), pickled)
    tensors = {name: tensor.contiguous() for name, tensor in rename(theirs.state_dict()).items()}
    assert any("proj_attn" in name for name in tensors) == (rename not in (dict, convolutional))
    if pickled:
        torch.save(tensors, tmp_path / where / f"{FILE}.bin")
    else:
        save_file(tensors, tmp_path / where / f"{FILE}.safetensors")
    assert_same_tensors(tmp_path, theirs)


def test_ema_and_raw_are_read_from_where_the_trainer_wrote_them(tmp_path):
    """diffusers' trainer writes unet/ and unet_ema/, whose config.json holds EMA settings."""
    raw, averaged = publish(tmp_path / "unet", tiny_experiment()).state_dict(), tmp_path / "unet_ema"
    ema = publish(averaged, tiny_experiment())
    ema.load_state_dict({name: tensor + 1 for name, tensor in raw.items()})
    ema.save_pretrained(averaged)
    rewrite(averaged / "config.json", decay=0.9999, optimization_step=5, use_ema_warmup=False)
    places = ((tmp_path, "raw", 0), (tmp_path, "ema", 1), (averaged, "ema", 1))
    for path, weights, added in (*places, (averaged / f"{FILE}.safetensors", "ema", 1)):
        found = read(path, weights=weights)["conv_in.bias"]
        torch.testing.assert_close(found, raw["conv_in.bias"] + added)
    for folder, weights in (("unet", "ema"), ("unet_ema", "raw"), (".", "unknown")):
        assert_refused(r"published\.weights", tmp_path / folder, weights=weights, error=ConfigError)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, SHARDS, {"variant": "x", **SHARDS}])
@pytest.mark.parametrize("pickled", [False, True])
def test_whatever_save_pretrained_writes_loads(tmp_path, options, pickled):
    folder = tmp_path / "models--g--d" / "snapshots" / "abc" / "unet"  # as in the Hub's cache
    theirs = publish(folder, tiny_experiment(), pickled, **options)
    weights = [file for file in folder.iterdir() if file.suffix != ".json"]
    assert f"{FILE}.safetensors" not in [file.name for file in weights]
    for path in (tmp_path / "models--g--d", folder, min(weights)):
        assert_same_tensors(path, theirs)
    if len(weights) > 1:
        weights[0].unlink()
        assert_refused("no complete", folder, error=ConfigError)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    publish(tmp_path, tiny_experiment(), pickled=True)
    proof = tmp_path / "it ran"
    harmful = type("Harmful", (), {"__reduce__": lambda _: (os.mkdir, (str(proof),))})()
    torch.save({"conv_in.weight": harmful}, tmp_path / f"{FILE}.bin")
    assert_refused("holds more than plain tensors", tmp_path)
    (tmp_path / f"{FILE}.bin").write_bytes(pickle.dumps(harmful))
    assert_refused("holds more than plain tensors (?!.*weights_only)", tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_broken_files_are_named(tmp_path, kind):
    theirs, file = publish(tmp_path, tiny_experiment(), pickled=kind == "bin"), tmp_path / f"{FILE}.{kind}"
    if kind == "safetensors":
        save_file(load_file(file) | {"extra": torch.zeros(1)}, file)
        assert_refused(r"1 unexpected \(extra\)", tmp_path)
    theirs.load_state_dict({name: tensor * torch.nan for name, tensor in theirs.state_dict().items()})
    theirs.save_pretrained(tmp_path, safe_serialization=kind != "bin")
    assert_refused("not finite", tmp_path)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    reasons = {pointer: "is a Git LFS pointer.*git lfs pull", b"": "is broken", b"no weights": "is broken"}
    for content, reason in reasons.items():
        file.write_bytes(content)
        assert_refused(f"{file.name} {reason}", tmp_path)
    if kind == "bin":
        torch.save({"state_dict": {}}, file)
        assert_refused(f"{file.name} holds no plain table of tensors", tmp_path)


MALFORMED = [
    ("block_out_channels", "x"), ("block_out_channels", []), ("block_out_channels", [0, 0]),
    ("down_block_types", [1, 2]), ("up_block_types", "UpBlock2D"), ("layers_per_block", "two"),
    ("norm_num_groups", 0), ("in_channels", [1]),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "value"), [
    *MALFORMED,
    ("downsample_padding", 1), ("norm_eps", 1e-5), ("flip_sin_to_cos", True), ("freq_shift", 0),
    ("attention_head_dim", 8), ("act_fn", "gelu"), ("add_attention", False),
    ("resnet_time_scale_shift", "scale_shift"), ("time_embedding_type", "fourier"),
    ("class_embed_type", "timestep"), ("center_input_sample", True), ("block_out_channels", [8, 12]),
    ("up_block_types", ["UpBlock2D", "UpBlock2D"]), ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"]),
    ("sample_size", [8, 16]), ("sample_size", None), ("brand_new_setting", 3),
    # Left out means diffusers' default, which is another network.
    ("downsample_padding", "absent"), ("norm_eps", "absent"), ("flip_sin_to_cos", "absent"),
    ("freq_shift", "absent"), ("attention_head_dim", "absent"),
])  # fmt: skip
def test_settings_of_another_network_are_refused_by_name(tmp_path, setting, value):
    publish(tmp_path, tiny_experiment())
    rewrite(tmp_path / "config.json", **{setting: value})
    assert_refused(f"{setting} is " if (setting, value) in MALFORMED else setting, tmp_path)
    if (setting, value) in MALFORMED:
        assert diffusers_layout.derive_overrides(config.PublishedConfig(str(tmp_path), "raw")) == []


def test_a_network_of_another_shape_names_what_to_set(tmp_path):
    shape = [
        "data.image_size=16", "data.channels=3", "model.channels=24", "model.channel_mult=[1,3,2]",
        "model.num_res_blocks=2", "model.attention_resolutions=[8,4]", "model.norm_groups=6",
    ]  # fmt: skip
    theirs = publish(tmp_path, tiny_experiment(*shape))
    with pytest.raises(ConfigError) as caught:
        read(tmp_path)
    remedies = " ".join(line.split("; set ")[1] for line in caught.value.problems if "; set " in line)
    assert set(remedies.split()) == set(shape)
    message = r"out_channels is 3, .* has 6; a learned diffusion\.variance"
    assert_refused(message, tmp_path, *shape, *LEARNED, error=ConfigError)
    assert_computes_the_same(importing(tmp_path, *remedies.split()), theirs)


def test_the_architecture_of_what_is_imported_is_derived(tmp_path):
    published = config.PublishedConfig(str(tmp_path), "ema")
    assert diffusers_layout.derive_overrides(published) == []
    publish(tmp_path, tiny_experiment(*SHAPES["wide"]))
    derived = diffusers_layout.derive_overrides(published)
    assert {*SHAPES["wide"], "data.image_size=8"} <= set(derived)
    # what changes nothing may be left out
    names = ("time_embedding_dim", "add_attention", "attn_norm_num_groups", "dropout", "upsample_type")
    rewrite(tmp_path / "config.json", **dict.fromkeys(names, "absent"))
    assert read(tmp_path, *derived)
    words = ["run", "cifar10_published", "data.source=digits", "data.path=null", "model.norm_groups=4"]
    parsed = parse_arguments([*words, f"published.path={tmp_path}", "published.weights=ema"])
    experiment, _ = arguments.load_experiment_and_cluster(parsed)
    assert (experiment.model.channels, experiment.model.norm_groups, experiment.data.channels) == (24, 4, 1)


@pytest.mark.parametrize("where", ["scheduler", "."])
@pytest.mark.parametrize(("changes", "named"), [
    ({"num_train_timesteps": 1000}, "it has 1000 timesteps, the experiment diffusion.timesteps=20"),
    ({"beta_end": 0.03}, "diffusion.beta_schedule=linear"),
    ({"beta_schedule": "scaled_linear"}, "diffusion.beta_schedule=linear"),
    ({"beta_schedule": "sigmoid"}, "sigmoid"), ({"trained_betas": ["a"]}, "is none of ours"),
    ({"num_train_timesteps": 10**12}, "is none of ours"), ({"rescale_betas_zero_snr": True}, "rescaled"),
    ({"prediction_type": "sample"}, "diffusion.predict=eps"),
])  # fmt: skip
def test_weights_of_another_diffusion_are_refused(tmp_path, where, changes, named):
    publish(tmp_path, tiny_experiment())
    scheduler = tmp_path / where / "scheduler_config.json"
    scheduler.parent.mkdir(exist_ok=True)
    scheduler.write_text(json.dumps({"num_train_timesteps": 20, "beta_schedule": "linear"}))
    assert read(tmp_path)
    rewrite(scheduler, **changes)
    assert_refused(re.escape(named), tmp_path, error=ConfigError)


def test_a_folder_without_weights_or_settings_is_refused(tmp_path):
    assert_refused(r"holds no complete diffusion_pytorch_model\.safetensors or", tmp_path, error=ConfigError)
    publish(tmp_path, tiny_experiment())
    (tmp_path / "config.json").unlink()
    assert_refused(r"config\.json cannot be read \(No such file", tmp_path)
    with pytest.raises(ConfigError, match=r"published\.weights is null; set"):
        tiny_experiment(f"published.path={tmp_path}")
    with pytest.raises(ConfigError, match=r"published\.path is null"):
        keys.make_run_key(config.load_experiment("cifar10_published", []), "data")


def test_the_run_key_hashes_the_weights_and_neither_their_place_nor_training(tmp_path):
    def key(*arguments, **more) -> str:
        return keys.make_run_key(importing(*arguments, **more), "data")

    for folder in ("a", "b", "c"):
        publish(tmp_path / folder, tiny_experiment())
    (file,) = (tmp_path / "c").glob("*.safetensors")
    save_file(load_file(file) | {"conv_in.bias": torch.ones(8)}, file)
    first = key(tmp_path / "a")
    assert first == key(tmp_path / "b") == key(tmp_path / "a", "train.lr=7", "train.steps=9")
    assert first not in (key(tmp_path / "c"), key(tmp_path / "a", weights="ema"))
    assert first != keys.make_run_key(tiny_experiment(), "data")


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_weights_compute_the_same_here_and_in_diffusers(tmp_path, overrides):
    """Those that diffusers saved, and those that we exported, which come back as they were."""
    experiment = tiny_experiment(*overrides)
    theirs = publish(tmp_path / "theirs", experiment)
    assert_computes_the_same(importing(tmp_path / "theirs", *overrides), theirs)
    run, ours = trained(tmp_path, experiment)
    for which, added, step in (("ema", 1, STEP), ("raw", 0, None)):
        diffusers_layout.export_to_diffusers(run, out := tmp_path / which, which, step)
        expected = {name: tensor + added for name, tensor in ours.state_dict().items()}
        torch.testing.assert_close(read(out, *overrides), expected, rtol=0, atol=0)
        with safe_open(out / "unet" / f"{FILE}.safetensors", "pt") as file:
            source = f"{which} weights of step 6 of {run.path.name}"
            assert file.metadata() == {"format": "pt", "source": source, "weights": which}
    theirs, report = UNet2DModel.from_pretrained(out / "unet", output_loading_info=True)
    assert not any(report.values())
    assert_computes_the_same(importing(out, *overrides), theirs.eval().requires_grad_(False))


@pytest.mark.parametrize("overrides", [
    ["sample.variance=fixedsmall"], ["diffusion.beta_schedule=quad"],
    ["diffusion.beta_schedule=cosine", "diffusion.variance=fixedsmall"],
    ["diffusion.beta_schedule=jsd", "diffusion.predict=x0"], LEARNED,
], ids=" ".join)  # fmt: skip
def test_the_same_noise_becomes_the_same_pictures(tmp_path, monkeypatch, overrides):
    experiment = tiny_experiment("diffusion.timesteps=25", "sample.variance=null", *overrides)
    run, net = trained(tmp_path, experiment)
    diffusers_layout.export_to_diffusers(run, tmp_path / "out", "raw", None)
    diffusion, generator = Diffusion(experiment.diffusion), torch.Generator().manual_seed(3)
    z = torch.randn(len(diffusion) + 1, 8, 1, 8, 8, generator=generator)  # x_T last
    *_, last = run_chain(diffusion, net, z[-1], lambda t: z[t], variance=experiment.sample.variance)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    drawn = iter(z.flip(0))  # in the order in which diffusers asks
    for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, **__: next(drawn))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(8, num_inference_steps=len(diffusion), output_type="np").images
    theirs = (theirs * 255).round().transpose(0, 3, 1, 2)
    levels = abs(to_uint8(last.x_t).numpy().astype(int) - theirs)
    assert theirs.std() > 20 and (levels <= 1).mean() >= 0.999


def test_what_diffusers_has_no_name_for_is_refused(tmp_path):
    for word in ("model.resample=transposed", "diffusion.predict=mean", "diffusion.variance=learned"):
        run, _ = trained(tmp_path, tiny_experiment(word, "diffusion.loss=vlb"))
        with pytest.raises(PipelineError, match=word):
            diffusers_layout.export_to_diffusers(run, tmp_path / "out", "raw", None)
    other = dataclasses.replace(tiny_experiment(), model=NETWORKS["mha_unet"]())
    with pytest.raises(PipelineError, match=r"model\.name=mha_unet"):
        diffusers_layout.make_network_settings(other)


def test_a_trained_run_leaves_enters_and_scores_the_same(sharded_storage, empty_store, tmp_path, capsys):
    storage, digits = sharded_storage, ["digits", *TINY, "sample.weights=raw", "figures.which=[]"]
    run = find.make_place(config.load_experiment("digits", digits[1:]), storage)
    one_cpu().run_workers(train.STAGE.run_worker, run)
    run_stage(evaluate, run)
    write_record(run, ())
    exported = tmp_path / "exported"
    for weights, folder in (("raw", exported), ("ema", tmp_path / "ema")):
        main(["export", run.path.name, str(folder), f"--weights={weights}", f"cluster.storage={storage}"])
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlicense:") and f"{weights} weights of step 6" in card
        has_scores = "| NLL, bits/dim | ≤" in card and "| Decoder |" in card
        assert has_scores == (weights == "raw"), "of these weights alone"
    settings, nowhere = run.experiment_yaml.read_text(), ["export", run.path.name, str(tmp_path / "no")]
    assert main([*nowhere, "--step=5", f"cluster.storage={storage}"]) == 1
    assert "no checkpoint of step 5 (there are: " in capsys.readouterr().err
    run.experiment_yaml.write_text(settings.replace("beta_end: 0.", "beta_end: 0.0"))  # of another run
    assert main([*nowhere, f"cluster.storage={storage}"]) == 1 and not (tmp_path / "no").exists()
    run.experiment_yaml.write_text(settings)
    wrong = ["import", str(exported), "--weights=ema", *digits, "name=entered", f"cluster.storage={storage}"]
    assert main(wrong) == 2 and "the weights in this folder are raw" in capsys.readouterr().err
    words = [*digits, "name=entered", *ONE_CPU, f"cluster.storage={storage}"]
    words.append(f"cluster.tracking_uri=sqlite:///{shutil.copy(empty_store, tmp_path)}")
    assert main(["import", str(exported), "--weights=raw", *words]) == 0
    (entered,) = storage.glob("entered-*")
    assert list_steps(entered / "train") == [STEP]
    found = find.make_place(config.load_experiment(str(entered / "experiment.yaml"), []), storage)
    run_stage(evaluate, found)
    assert not found.log.exists(), "nothing was trained"
    first, second = map(results, (run, found))
    assert first["scores"] == second["scores"]
    assert (first["protocol"]["weights"], second["protocol"]["weights"]) == ("raw", "raw")
    assert json.dumps(second["protocol"]) == json.dumps(first["protocol"] | second["protocol"])

"""What an evaluation is given: sets that are short or of other images, units of another key, a user's statistics."""

import dataclasses
import io
import shutil

import numpy as np
import pytest
from conftest import one_cpu, tiny_experiment
from PIL import Image
from staged import asking_for, results, run_stage, scoring, with_weights

from pipeline.engine.find import make_place
from pipeline.errors import ConfigError, PipelineError
from pipeline.scores import classifier, preparations
from pipeline.scores.extractors import find_extractor
from pipeline.scores.reference import load_reference, locate_statistics
from pipeline.stages import evaluate
from pipeline.stages.evaluate import bound
from pipeline.stages.evaluate.stage import list_samples
from pipeline.store import tars
from pipeline.store.files import (
    hash_file,
    read_arrays,
    read_manifest,
    read_unit_arrays,
    write_arrays,
    write_json,
    write_unit_arrays,
)


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 20)


@pytest.fixture
def projected(sampled):
    experiment, run = sampled
    return scoring(experiment, metrics=("fid",), features="projection"), run


def test_a_short_set_is_refused_and_a_longer_one_is_cut(sampled):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=("fid",))
    with pytest.raises(PipelineError, match="holds 12 images where 13 are asked for"):
        run_stage(evaluate, asking_for(experiment, num_images=13), run)
    shorter = asking_for(experiment, num_images=8)
    run_stage(evaluate, shorter, run)
    assert results(shorter, run)["protocol"]["n"] == 8


def test_a_unit_with_a_row_too_few_is_refused(sampled):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=("fid",))
    run_stage(evaluate, experiment, run)
    extractor = find_extractor(run.of(experiment))
    last = list_samples(run.of(experiment))[-1]
    file = run.score_units / extractor.name / f"{last.sha256[:16]}.npz"
    with np.load(file) as arrays:
        cut = {name: array[:-1] if array.ndim else array for name, array in arrays.items()}
    np.savez(file, **cut)
    with pytest.raises(PipelineError, match=r"11 images .* 12 "):
        run_stage(evaluate, experiment, run)


def test_reference_statistics_are_never_stale(sampled):
    experiment, run = sampled
    experiment = scoring(experiment, metrics=("fid",), features="projection")
    run_stage(evaluate, experiment, run)
    extractor = find_extractor(run.of(experiment))
    file, _ = locate_statistics(run, extractor, "train")
    assert load_reference(run, extractor, "train").n == 1437
    assert locate_statistics(run, extractor, "test")[0] != file
    assert run.data in file.parents and extractor.name in file.name
    kept = file.read_bytes()
    write_arrays(file, **{**read_arrays(file), "content": np.array("of other images")})
    assert load_reference(run, extractor, "train") is None
    file.write_bytes(kept)  # other tests use the same storage


def test_labels_beyond_the_classes_are_refused(sampled):
    experiment, run = sampled
    fewer = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, labels=5))
    with pytest.raises(PipelineError, match=r"labels 0\.\.9 .*data\.labels=5 allows 0\.\.4"):
        preparations.train_classifier(one_cpu().context, run.of(fewer))


# Units and tars that are not what they are taken for


def replace_tar(experiment, run, images):
    """The first tar of the samples, with its place in the manifest, as if these images had been drawn."""
    folder = run.of(experiment).samples
    manifest = read_manifest(folder)
    name = manifest["splits"]["samples"]["shards"][0]
    records = (tars.Record(f"{i:08d}", tars.encode_png(image), None) for i, image in enumerate(images))
    facts = tars.write_tar(folder / name, records)
    manifest["files"][name] = {key: facts[key] for key in tars.FILE_FACTS} | {"count": 6}
    write_json(folder / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(16, 16)] * 6, r"00000\.tar holds images of shape \(C, H, W\) = \(1, 16, 16\) where \(1, 8, 8\)"),
        ([(8, 8)] * 5 + [(8, 9)], r"\(1, 8, 9\) where \(1, 8, 8\) is scored"),
        ([(8, 8, 3)] * 6, r"\(3, 8, 8\) where \(1, 8, 8\) is scored"),
        ([(8, 8)] * 5, r"00000\.tar holds 5 images, not 6"),
    ],
    ids=["size", "one_of_another_size", "mode", "short_by_one"],
)
def test_other_images_in_a_tar_are_refused(projected, shapes, message):
    experiment, run = projected
    replace_tar(experiment, run, [np.zeros(shape, np.uint8) for shape in shapes])
    with pytest.raises(PipelineError, match=message) as refused:
        run_stage(evaluate, experiment, run)
    assert "\n" not in str(refused.value)


def test_a_mode_that_no_stage_writes_is_refused(projected, monkeypatch):
    experiment, run = projected

    def palette(image):
        stream = io.BytesIO()
        Image.fromarray(image).convert("P").save(stream, "PNG")
        return stream.getvalue()

    monkeypatch.setattr(tars, "encode_png", palette)
    replace_tar(experiment, run, [np.zeros((8, 8), np.uint8)] * 6)
    with pytest.raises(PipelineError, match=r"00000\.tar cannot be scored \(a PNG of mode P"):
        run_stage(evaluate, experiment, run)


def test_a_tar_that_changed_after_it_was_sealed_is_refused(projected):
    experiment, run = projected
    tar = run.of(experiment).samples / "00001.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with pytest.raises(PipelineError, match=r"00001\.tar .*does not match its sha256"):
        run_stage(evaluate, experiment, run)


def test_features_of_other_images_are_not_taken_for_these(projected):
    """A unit of another key is passed over; under the name of one of ours it is refused."""
    experiment, run = projected
    run_stage(evaluate, experiment, run)
    scored = results(experiment, run)
    extractor = find_extractor(run.of(experiment))
    folder = run.score_units / extractor.name
    first, second = (folder / f"{shard.sha256[:16]}.npz" for shard in list_samples(run.of(experiment)))
    shutil.copy(first, folder / "0123456789abcdef.npz")
    run_stage(evaluate, experiment, run)
    assert results(experiment, run) == scored
    shutil.copy(first, second)
    with pytest.raises(PipelineError, match=f"{second.stem}.npz holds .*{first.stem}, not .*{second.stem}"):
        run_stage(evaluate, experiment, run)


def test_a_bound_of_another_key_is_not_taken_for_this(sampled):
    experiment, run = sampled
    other = scoring(experiment, decoder="erf")
    run_stage(evaluate, experiment, run)
    run_stage(evaluate, other, run)
    ours, theirs = (next(iter(bound.plan_units(run.of(e)))) for e in (experiment, other))
    shutil.copy(theirs, ours)
    with pytest.raises(PipelineError, match=f"holds {theirs.parent.name}/.*, not {ours.parent.name}/"):
        run_stage(evaluate, experiment, run)


def test_a_bound_of_fewer_images_or_timesteps_is_refused(sampled):
    experiment, run = sampled
    run_stage(evaluate, experiment, run)
    file = next(iter(bound.plan_units(run.of(experiment))))
    whole = read_unit_arrays(file)
    for cut in (np.s_[:3], np.s_[:, :19]):
        write_unit_arrays(file, **{**whole, "terms": whole["terms"][cut]})
        with pytest.raises(PipelineError, match=r"terms of shape \((3, 20|4, 19)\), not \(4, 20\)"):
            run_stage(evaluate, experiment, run)


# A finished evaluation whose inputs changed


def test_other_weights_under_the_same_step_make_the_bound_again(sampled):
    experiment, run = sampled
    run_stage(evaluate, experiment, run)
    before = results(experiment, run)["scores"]["nll_bpd"]
    with_weights(experiment, run, scale=0.5)
    assert not evaluate.STAGE.is_done(run.of(experiment))
    assert len(run_stage(evaluate, experiment, run)) == 2
    assert results(experiment, run)["scores"]["nll_bpd"] != pytest.approx(before, rel=1e-3)


def test_a_checkpoint_that_was_deleted_leaves_its_scores(sampled):
    experiment, run = sampled
    run_stage(evaluate, experiment, run)
    shutil.rmtree(run.step_folder(experiment.train.steps))
    assert evaluate.STAGE.is_done(run.of(experiment))


# A user's statistics


def statistics(path, **changed):
    draw = np.random.default_rng(0).normal(size=(200, 64))
    arrays = {"mu": draw.mean(axis=0), "sigma": np.cov(draw, rowvar=False)} | changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def test_a_users_statistics_are_the_reference_and_stand_in_the_protocol(projected, tmp_path):
    """The training split's own statistics, brought as a file, give the same FID."""
    experiment, run = projected
    run_stage(evaluate, experiment, run)
    kept = load_reference(run, find_extractor(run.of(experiment)), "train")
    file = statistics(tmp_path / "their.npz", mu=kept.mu, sigma=kept.sigma)
    brought = scoring(experiment, reference=file)
    run_stage(evaluate, brought, run)
    found, own = results(brought, run), results(experiment, run)
    assert found["scores"] == own["scores"] and found["reference_points"] == own["reference_points"]
    named = f"their.npz (sha256 {hash_file(tmp_path / 'their.npz')[:8]})"
    assert found["protocol"]["reference"] == named and found["protocol"]["reference_images"] is None
    assert f"reference {named}, not train" in found["protocol"]["why_not"]
    assert str(tmp_path) not in str(found)


def test_other_statistics_under_the_same_name_are_another_evaluation(projected, tmp_path):
    experiment, run = projected
    file = statistics(tmp_path / "their.npz")
    experiment = scoring(experiment, reference=file)
    run_stage(evaluate, experiment, run)
    before = results(experiment, run)["scores"]["fid"]
    statistics(tmp_path / "their.npz", mu=np.ones(64), n=np.array(777))
    assert not evaluate.STAGE.is_done(run.of(experiment))
    run_stage(evaluate, experiment, run)
    found = results(experiment, run)
    assert found["scores"]["fid"] != pytest.approx(before, rel=1e-3)
    assert found["protocol"]["reference_images"] == 777


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mu": None}, "has no mu, only sigma"),
        ({"mu": None, "sigma": None}, "has no mu and no sigma, only nothing"),
        (
            {"mu": np.zeros(2048), "sigma": np.eye(2048)},
            "is of 2048 features, where evaluate.features has 64",
        ),
        ({"mu": np.zeros(63)}, r"mu of shape \(63,\) and sigma of shape \(64, 64\)"),
        ({"mu": np.zeros(64, np.int64)}, "mu of type int64, not float64"),
        ({"sigma": np.eye(64, dtype=np.float16)}, "sigma of type float16, not float64"),
        ({"mu": np.full(64, np.nan)}, "values that are not finite"),
        ({"sigma": np.triu(np.ones((64, 64)))}, "a sigma that is not symmetric"),
        ({"n": np.array(2.5)}, "an n that is no whole number"),
        ({"mu": np.array([{}], dtype=object)}, r"is no \.npz of plain arrays \(Object arrays"),
    ],
    ids=["mu", "both", "width", "shape", "integers", "halves", "nan", "triangle", "n", "objects"],
)
def test_statistics_of_anything_else_are_refused_in_a_line(projected, tmp_path, changed, message):
    experiment, run = projected
    experiment = scoring(experiment, reference=statistics(tmp_path / "their.npz", **changed))
    with pytest.raises(PipelineError, match=message) as refused:
        evaluate.STAGE.check_before_training(run.of(experiment))  # before anything is trained
    assert "\n" not in str(refused.value) and "their.npz" in str(refused.value)


def test_a_reference_that_is_neither_split_nor_statistics_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate\.reference is 'trian' \(did you mean 'train'\?\)"):
        tiny_experiment("evaluate.reference=trian")
    with pytest.raises(ConfigError, match=r"evaluate\.reference '.*nowhere\.npz' is not a file"):
        make_place(tiny_experiment("evaluate.reference=nowhere.npz"), tmp_path)
    file = statistics(tmp_path / "their.npz")
    with pytest.raises(
        ConfigError, match=r"evaluate\.reference names statistics, and kid and prc need images"
    ):
        tiny_experiment(f"evaluate.reference={file}", "evaluate.metrics=[fid,kid,prc]")


def test_statistics_are_found_from_any_working_folder(tmp_path, monkeypatch):
    statistics(tmp_path / "their.npz")
    monkeypatch.chdir(tmp_path)
    assert tiny_experiment("evaluate.reference=their.npz").evaluate.reference == str(tmp_path / "their.npz")


def test_without_a_test_split_fid_test_is_refused_before_training(tiny_run):
    experiment, run = tiny_run
    run = dataclasses.replace(run, data_key="train-only")
    tars.write_shard_manifest(run.data, {"train": []}, image_size=8, channels=1)
    with pytest.raises(PipelineError, match=r"no test split.*data\.test_images"):
        evaluate.STAGE.check_before_training(run.of(scoring(experiment, metrics=("fid_test",))))

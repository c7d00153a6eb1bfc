"""What an evaluation is given: sets that are short or of other images, units of another key, a user's statistics."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import one_cpu, tiny_experiment
from staged import asking_for, change, evaluated, results, run_stage, scoring, with_weights

from pipeline.engine.find import make_place
from pipeline.errors import ConfigError, PipelineError
from pipeline.scores import preparations, reference
from pipeline.scores.extractors import find_extractor
from pipeline.scores.image_sets import write_shard_features
from pipeline.scores.reference import load_reference, load_user_statistics, locate_statistics
from pipeline.stages import evaluate
from pipeline.stages.evaluate import bound, list_sample_shards
from pipeline.store import tars
from pipeline.store.arrays import read_arrays, read_unit_arrays, write_arrays, write_unit_arrays
from pipeline.store.files import hash_file


@pytest.fixture
def projected(sampled):
    return scoring(sampled, metrics=("fid",), features="projection")


def feature_files(run):
    folder = run.score_units / find_extractor(run).name
    return [folder / f"{shard.sha256[:16]}.npz" for shard in list_sample_shards(run)]


def test_a_short_set_is_refused_and_a_longer_one_is_cut(projected):
    with pytest.raises(PipelineError, match="holds 12 images where 13 are asked for"):
        run_stage(evaluate, asking_for(projected, num_images=13))
    assert evaluated(asking_for(projected, num_images=8))["protocol"]["n"] == 8
    run_stage(evaluate, projected)
    last = feature_files(projected)[-1]
    arrays = read_unit_arrays(last)
    write_unit_arrays(last, **{name: array[:-1] for name, array in arrays.items()})
    with pytest.raises(PipelineError, match=r"11 images .* 12 "):
        run_stage(evaluate, projected)


def test_neither_other_statistics_nor_features_of_other_images_are_taken_for_these(projected, caplog):
    """Features of another key are skipped; under the name of one of ours they are named and made again."""
    scored, extractor = evaluated(projected), find_extractor(projected)
    file, _ = locate_statistics(projected, extractor, "train")
    assert load_reference(projected, extractor, "train").n == 1437
    assert locate_statistics(projected, extractor, "test")[0] != file
    kept = file.read_bytes()
    write_arrays(file, **{**read_arrays(file), "content": np.array("of other images")})
    assert load_reference(projected, extractor, "train") is None
    file.write_bytes(kept)  # other tests use the same storage
    first, second = feature_files(projected)
    shutil.copy(first, first.with_name("0123456789abcdef.npz"))
    assert evaluated(projected) == scored
    shutil.copy(first, second)
    assert evaluated(projected)["scores"] == scored["scores"]
    assert f"{first.stem}, not" in caplog.text and second.name in caplog.text


@pytest.mark.parametrize(("shapes", "message"), [
    ([(16, 16)] * 6, r"00000\.tar holds images of shape \(C, H, W\) = \(1, 16, 16\) where \(1, 8, 8\)"),
    ([(8, 8)] * 5 + [(8, 9)], r"\(1, 8, 9\) where \(1, 8, 8\) is scored"),
    ([(8, 8, 3)] * 6, r"\(3, 8, 8\) where \(1, 8, 8\) is scored"),
    ([(8, 8)] * 5, r"00000\.tar holds 5 images, not 6"),
    ("changed", r"00000\.tar .*does not match its sha256"),
    ("no PNG", r"00000\.tar cannot be scored \(.*makes it again"),
])  # fmt: skip
def test_other_images_in_a_tar_are_refused(tmp_path, shapes, message):
    images = [np.zeros(shape, np.uint8) for shape in ([(8, 8)] * 6 if isinstance(shapes, str) else shapes)]
    pngs = [b"not a PNG" if shapes == "no PNG" else tars.encode_png(image) for image in images]
    records = (tars.Record(f"{i:08d}", png, None) for i, png in enumerate(pngs))
    written = tars.write_tar(tmp_path / "00000.tar", records)["sha256"]
    shard = tars.Shard(tmp_path, "00000.tar", "samples", 0, 6, "another" if shapes == "changed" else written)
    with pytest.raises(PipelineError, match=message) as refused:
        write_shard_features(one_cpu().context, None, shard, (1, 8, 8), tmp_path / "features.npz")
    assert "\n" not in str(refused.value)


def test_a_bound_of_another_key_or_shape_or_of_other_weights_is_made_again(sampled, caplog):
    """Deleted weights leave it."""
    other = scoring(sampled, decoder="erf")
    run_stage(evaluate, sampled)
    run_stage(evaluate, other)
    ours, theirs = (next(iter(bound.plan_units(e))) for e in (sampled, other))
    whole = read_unit_arrays(ours)
    shutil.copy(theirs, ours)
    run_stage(evaluate, sampled)
    assert f"holds {theirs.parent.name}/" in caplog.text
    assert np.array_equal(read_unit_arrays(ours)["terms"], whole["terms"])
    for cut in (np.s_[:3], np.s_[:, :19]):
        write_unit_arrays(ours, **{**whole, "terms": whole["terms"][cut]})
        with pytest.raises(PipelineError, match=r"terms of shape \((3, 20|4, 19)\), not \(4, 20\)"):
            run_stage(evaluate, sampled)
    before = results(sampled)["scores"]["nll_bpd"]
    with_weights(sampled, scale=0.5)
    assert not evaluate.STAGE.is_done(sampled)
    assert len(run_stage(evaluate, sampled)) == 2
    assert results(sampled)["scores"]["nll_bpd"] != pytest.approx(before, rel=1e-3)
    shutil.rmtree(sampled.locate_step(sampled.experiment.train.steps))
    assert evaluate.STAGE.is_done(sampled)


def statistics(path, **changed):
    draw = np.random.default_rng(0).normal(size=(200, 64))
    arrays = {"mu": draw.mean(axis=0), "sigma": np.cov(draw, rowvar=False)} | changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def test_a_users_statistics_are_the_reference_and_stand_in_the_protocol(projected, tmp_path):
    """The training split's own statistics, brought as a file, give the same FID; others under that name another."""
    own = evaluated(projected)
    kept = load_reference(projected, find_extractor(projected), "train")
    brought = scoring(projected, reference=statistics(tmp_path / "their.npz", mu=kept.mu, sigma=kept.sigma))
    found = evaluated(brought)
    assert found["scores"] == own["scores"] and found["reference_points"] == own["reference_points"]
    named = f"their.npz (sha256 {hash_file(tmp_path / 'their.npz')[:8]})"
    assert found["protocol"]["reference"] == named and found["protocol"]["reference_images"] is None
    assert f"reference {named}, not train" in found["protocol"]["why_not"]
    assert str(tmp_path) not in str(found)
    statistics(tmp_path / "their.npz", mu=np.ones(64), n=np.array(777))
    again = brought.replace_experiment(brought.experiment)  # a place hashes the file once
    assert not evaluate.STAGE.is_done(again)
    other = evaluated(again)
    assert other["scores"]["fid"] != pytest.approx(found["scores"]["fid"], rel=1e-3)
    assert other["protocol"]["reference_images"] == 777


@pytest.mark.parametrize(("changed", "message"), [
    ({"mu": None}, "has no mu, only sigma"),
    ({"mu": None, "sigma": None}, "has no mu and no sigma, only nothing"),
    ({"mu": np.zeros(65), "sigma": np.eye(65)}, "is of 65 features, where evaluate.features has 64"),
    ({"mu": np.zeros(63)}, r"mu of shape \(63,\) and sigma of shape \(64, 64\)"),
    ({"mu": np.zeros(64, np.int64)}, "mu of type int64, not float64"),
    ({"sigma": np.eye(64, dtype=np.float16)}, "sigma of type float16, not float64"),
    ({"mu": np.full(64, np.nan)}, "values that are not finite"),
    ({"sigma": np.triu(np.ones((64, 64)))}, "a sigma that is not symmetric"),
    ({"n": np.array(2.5)}, "an n that is no whole number"),
    ({"mu": np.array([{}], dtype=object)}, r"is no \.npz of plain arrays \(ValueError\)"),
    ({"sigma": -np.eye(64)}, "no covariance"),
    ({"n": np.array(-5)}, "an n that is no whole number"),
])  # fmt: skip
def test_statistics_of_anything_else_are_refused_in_a_line(tmp_path, changed, message):
    statistics(tmp_path / "their.npz", **changed)
    with pytest.raises(PipelineError, match=message) as refused:
        load_user_statistics(tmp_path / "their.npz", 64)
    assert "\n" not in str(refused.value) and "their.npz" in str(refused.value)


def test_statistics_are_read_by_name_whatever_lies_beside_them(tmp_path, monkeypatch):
    """Images, objects, an n of shape (1,), the other byte order; a size is looked at first."""
    held = {"n": np.array([200]), "mu": np.arange(64.0).astype(">f8"), "arr_0": np.array([{}], dtype=object)}
    found = load_user_statistics(Path(statistics(tmp_path / "their.npz", **held)), 64)
    assert found.n == 200 and found.mu.dtype == np.float64 and np.array_equal(found.mu, np.arange(64.0))
    monkeypatch.setattr(reference, "LARGEST", 1000)
    with pytest.raises(PipelineError, match=r"has sigma of more than 1,000 bytes"):
        load_user_statistics(tmp_path / "their.npz", 64)
    (tmp_path / "other.npz").write_text("mu")
    with pytest.raises(PipelineError, match=r"no \.npz of plain arrays"):
        load_user_statistics(tmp_path / "other.npz", 64)


def test_a_reference_that_cannot_be_used_is_refused_before_training(tiny_run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"evaluate\.reference is 'trian' \(did you mean 'train'\?\)"):
        tiny_experiment("evaluate.reference=trian")
    with pytest.raises(ConfigError, match=r"evaluate\.reference '.*nowhere\.npz' is not a file"):
        make_place(tiny_experiment("evaluate.reference=nowhere.npz"), tmp_path)
    file = statistics(tmp_path / "their.npz", mu=None)
    with pytest.raises(ConfigError, match=r"names statistics, and kid and prc need images"):
        tiny_experiment(f"evaluate.reference={file}", "evaluate.metrics=[fid,kid,prc]")
    monkeypatch.chdir(tmp_path)  # statistics are found from any working folder
    assert tiny_experiment("evaluate.reference=their.npz").evaluate.reference == file
    with pytest.raises(PipelineError, match="has no mu"):
        evaluate.STAGE.check_before_training(scoring(tiny_run, metrics=("fid",), reference=file))
    with pytest.raises(PipelineError, match=r"labels 0\.\.9 .*data\.labels=5 allows 0\.\.4"):
        preparations.train_classifier(one_cpu().context, change(tiny_run, "data", labels=5))
    tiny_run = dataclasses.replace(tiny_run, data_key="train-only")
    tars.write_shard_manifest(tiny_run.data, {"train": []}, image_size=8, channels=1)
    with pytest.raises(PipelineError, match=r"no test split.*data\.test_images"):
        evaluate.STAGE.check_before_training(scoring(tiny_run, metrics=("fid_test",)))

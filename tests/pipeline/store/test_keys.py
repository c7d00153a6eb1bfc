"""Keys hash content, and stay: a later option, at the value at which it changes nothing, moves no key."""

import dataclasses

import numpy as np
import pytest
from conftest import tiny_experiment

from pipeline import config
from pipeline.config import neutral
from pipeline.errors import PipelineError
from pipeline.store import keys
from pipeline.store.run import Place


def all_keys(experiment):
    data_key = keys.make_data_key(experiment, "f" * 12)
    place = Place("/root", experiment, data_key, keys.make_run_key(experiment, data_key))
    made = (place.sample_key, place.score_key, place.figures_key, place.selection_key)
    return [data_key, place.run_key, *made]


def keys_of(*overrides: str) -> dict[str, str]:
    found = all_keys(config.load_experiment("digits", list(overrides)))
    return dict(zip(("run", "samples", "score"), found[1:4], strict=True))


MOVED = {  # the keys that a word moves
    "": "train.checkpoint_every=7 train.keep=9 train.keep_every=400 train.keep_steps=[8] data.images_per_shard=9 "
    "evaluate.checkpoints=all evaluate.checkpoint_images=128 "
    + " ".join(f"{key}={'true' if value is False else 2}" for key, value in neutral.UNHASHED.items()),
    "score": "sample.num_images=600 evaluate.metrics=[nll]",
    "samples score": "train.steps=3000 sample.sampler=ddim sample.spacing=quadratic sample.ema_decay=0.999",
    "run samples score": "train.lr_decay=linear seed=1 train.lr=0.1 model.dropout=0.4 data.labels=11 "
    "diffusion.beta_schedule=quad model.class_conditional=true",
}


@pytest.mark.parametrize("moved", MOVED)
def test_what_extends_a_run_keeps_its_key_and_samples_and_scores_have_their_own(moved):
    unmoved = keys_of()
    for word in MOVED[moved].split():
        found = keys_of(word)
        assert [name for name in found if found[name] != unmoved[name]] == moved.split(), word
    one, other = (keys_of("train.lr_decay=linear", f"train.steps={n}")["run"] for n in (2000, 3000))
    assert one != other


def test_a_choice_by_score_changes_the_score():
    experiment = config.load_experiment("digits", ["evaluate.checkpoints=all", "sample.checkpoint=best"])
    with pytest.raises(PipelineError, match=r"known before evaluate\.checkpoints are scored"):
        keys.make_sample_key(experiment, "0a")
    first, second = (experiment.select_checkpoint(1200, of) for of in (3, 4))
    assert config.to_yaml(first) == config.to_yaml(experiment), "a chosen checkpoint is in no file"
    all_three = (first, second, config.load_experiment("digits", []))
    assert len({keys.make_sample_key(e, "0a") for e in all_three}) == 1
    assert len({keys.make_score_key(e, "0a") for e in all_three}) == 3


def test_keys_hash_content_not_place(tmp_path):
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for key, of in (("diffusion.betas", "run"), ("evaluate.extractor_weights", "score")):
        for file in files:
            np.save(file, np.linspace(1e-3, 0.3, 1000))
        first, second = (keys_of(f"{key}={file}")[of] for file in files)
        np.save(files[0], np.full(1000, 0.01))
        assert first == second != keys_of(f"{key}={files[0]}")[of]


@pytest.mark.parametrize("section", ["data", "diffusion", "model", "train", "sample", "evaluate", "figures"])
@pytest.mark.parametrize("at_rest", [None, False, 1, "none"])
def test_a_new_option_at_its_neutral_value_moves_no_key(monkeypatch, section, at_rest):
    """In a later version, whose section has one more option."""
    old = getattr(tiny_experiment(), section)
    options = {"bases": (type(old),), "frozen": True, "kw_only": True}
    kind = dataclasses.make_dataclass(type(old).__name__, [("added", object, None)], **options)
    monkeypatch.setitem(neutral.NEUTRAL, f"{section}.added", at_rest)
    for value in (at_rest, 7):
        later = dataclasses.replace(tiny_experiment(), **{section: kind(**vars(old), added=value)})
        # the data key names what it hashes: a fingerprint and a shape
        assert (all_keys(later) == all_keys(tiny_experiment())) == (value == at_rest or section == "data")


@pytest.mark.parametrize("key", sorted(neutral.NEUTRAL))
def test_a_value_that_differs_from_the_neutral_one_is_hashed(key):
    """Each entry is a real setting, and leaving it out is no collision."""
    section, _, name = key.partition(".")
    for value, hashed in ((neutral.NEUTRAL[key], None), ("something else", "something else")):
        its = dataclasses.replace(getattr(tiny_experiment(), section), **{name: value})
        assert neutral.get_key_content(section, its).get(name) == hashed


def test_a_corrected_formula_moves_the_keys_of_those_who_use_it(monkeypatch, tmp_path):
    """Masks depend on the image alone since version 2; of published weights nothing is dropped."""
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    published = (f"published.path={tmp_path}", "published.weights=ema", "model.dropout=0.1")
    learned = (variance := "diffusion.variance=learned_range", "diffusion.loss=hybrid")
    experiments = [tiny_experiment(*words) for words in ((), published, learned, ["model.dropout=0.1"])]
    before = list(map(all_keys, experiments))
    for formula, version, moved in ((variance, 3, [2]), (variance, 1, [2]), ("model.dropout", 1, [3])):
        with monkeypatch.context() as patch:  # the formula of t = 0 was corrected once
            patch.setitem(neutral.FORMULAS, formula, version)
            after = list(map(all_keys, experiments))
        assert [n for n in range(4) if after[n] != before[n]] == moved
        assert all(after[n][1] != before[n][1] for n in moved), "the key of the run"

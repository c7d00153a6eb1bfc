"""Keys stay: an option that is added later, at the value at which it changes nothing, moves no key."""

import dataclasses

import pytest
from conftest import tiny_experiment

from pipeline.config import neutral
from pipeline.store import keys
from pipeline.store.run import Place


def all_keys(experiment, fingerprint="f" * 12):
    data_key = keys.make_data_key(experiment, fingerprint)
    place = Place("/root", experiment, data_key, keys.make_run_key(experiment, data_key))
    made = (place.sample_key, place.score_key, place.figures_key, place.selection_key)
    return [data_key, place.run_key, *made]


def with_option(experiment, section, value):
    """The experiment as a later version has it, whose section has one more option."""
    old = getattr(experiment, section)
    options = {"bases": (type(old),), "frozen": True, "kw_only": True}
    kind = dataclasses.make_dataclass(type(old).__name__, [("added", object, None)], **options)
    values = {field.name: getattr(old, field.name) for field in dataclasses.fields(old)}
    return dataclasses.replace(experiment, **{section: kind(**values, added=value)})


@pytest.mark.parametrize("section", ["data", "diffusion", "model", "train", "sample", "evaluate", "figures"])
@pytest.mark.parametrize("at_rest", [None, False, 1, "none"])
def test_a_new_option_at_its_neutral_value_moves_no_key(monkeypatch, section, at_rest):
    experiment = tiny_experiment()
    before = all_keys(experiment)
    monkeypatch.setitem(neutral.NEUTRAL, f"{section}.added", at_rest)
    assert all_keys(with_option(experiment, section, at_rest)) == before
    if section != "data":  # the data key names what it hashes: a fingerprint and a shape
        assert all_keys(with_option(experiment, section, 7)) != before


@pytest.mark.parametrize("key", sorted(neutral.NEUTRAL))
def test_a_value_that_differs_from_the_neutral_one_is_hashed(key):
    """Each entry is a real setting, and leaving it out is no collision."""
    section, _, name = key.partition(".")
    experiment = tiny_experiment()
    there = getattr(experiment, section)
    assert name in {field.name for field in dataclasses.fields(there)}, f"{key} is no setting any more"
    at_rest = dataclasses.replace(there, **{name: neutral.NEUTRAL[key]})
    moved = dataclasses.replace(there, **{name: "something else"})
    found = [neutral.get_key_content(section, its).get(name) for its in (at_rest, moved)]
    assert found == [None, "something else"]


def test_what_moves_only_the_order_of_sums_is_in_no_key():
    for key in neutral.UNHASHED:
        value = "true" if neutral.UNHASHED[key] is False else 2
        assert all_keys(tiny_experiment(f"{key}={value}")) == all_keys(tiny_experiment()), key


def test_a_corrected_formula_moves_the_keys_of_those_who_use_it(monkeypatch, tmp_path):
    """Masks depend on the image alone since version 2; of published weights nothing is dropped."""
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    published = (f"published.path={tmp_path}", "published.weights=ema", "model.dropout=0.1")
    variance = "diffusion.variance=learned_range"
    learned = (variance, "diffusion.loss=hybrid")
    experiments = [tiny_experiment(*words) for words in ((), published, learned, ["model.dropout=0.1"])]
    before = list(map(all_keys, experiments))
    for formula, version, moved in ((variance, 3, [2]), (variance, 1, [2]), ("model.dropout", 1, [3])):
        with monkeypatch.context() as patch:  # the formula of t = 0 was corrected once
            patch.setitem(neutral.FORMULAS, formula, version)
            after = list(map(all_keys, experiments))
        assert [n for n in range(4) if after[n] != before[n]] == moved
        assert all(after[n][1] != before[n][1] for n in moved), "the key of the run"

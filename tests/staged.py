"""What tests of stages share: an untrained checkpoint, changed settings, and running a stage in this process."""

import dataclasses
from functools import partial

from conftest import one_cpu

from pipeline.engine.plan import list_rounds
from pipeline.stages import evaluate
from pipeline.store import checkpoint
from pipeline.store.files import read_json


def with_weights(place, scale=1.0):
    """A checkpoint at the step that is sampled; untrained, but with an output that is not nearly zero, or the
    images would hardly depend on it."""
    tensors = checkpoint.create_network(place.experiment).state_dict()
    tensors["conv_out.weight"] *= 1e5 * scale
    raw, step = {f"net.{name}": tensor for name, tensor in tensors.items()}, place.experiment.train.steps
    checkpoint.save_checkpoint(place.locate_step(step), raw, tensors, step)
    checkpoint.load_model.cache_clear()


def change(place, section, **changes):
    changed = dataclasses.replace(getattr(place.experiment, section), **changes)
    return place.replace_experiment(dataclasses.replace(place.experiment, **{section: changed}))


asking_for, scoring = partial(change, section="sample"), partial(change, section="evaluate")


def results(place):
    return read_json(place.metrics_json, dict)


def evaluated(place):
    """What metrics.json holds after an evaluation."""
    run_stage(evaluate, place)
    return results(place)


def run_stage(stage, place):
    ran = []
    for units in list_rounds(stage.STAGE, place):
        one_cpu().run_units(units, lambda unit: ran.append(unit.name))
    return ran

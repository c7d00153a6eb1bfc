"""What tests of stages share: an untrained checkpoint, changed settings, and running a stage in this process."""

import dataclasses

from conftest import one_cpu

from pipeline.engine.plan import list_rounds
from pipeline.store import checkpoint
from pipeline.store.files import read_json


def with_weights(experiment, run, scale=1.0):
    """A checkpoint at the step that is sampled; untrained, but with an output that is not nearly zero, or the
    images would hardly depend on it."""
    tensors = checkpoint.create_network(experiment).state_dict()
    tensors["conv_out.weight"] *= 1e5 * scale
    raw = {f"net.{name}": tensor for name, tensor in tensors.items()}
    checkpoint.save_checkpoint(run.step_folder(experiment.train.steps), raw, tensors, experiment.train.steps)
    checkpoint.load_model.cache_clear()


def change(experiment, section, **changes):
    """The experiment with other settings in one section."""
    return dataclasses.replace(
        experiment, **{section: dataclasses.replace(getattr(experiment, section), **changes)}
    )


def asking_for(experiment, **changes):
    return change(experiment, "sample", **changes)


def scoring(experiment, **changes):
    return change(experiment, "evaluate", **changes)


def results(experiment, run):
    """What the evaluation found."""
    return read_json(run.of(experiment).metrics_json, dict)


def run_stage(stage, experiment, run):
    """Run the stage; the names of its units."""
    ran = []
    for units in list_rounds(stage.STAGE, run.of(experiment)):
        one_cpu().run_units(units, lambda unit: ran.append(unit.name))
    return ran

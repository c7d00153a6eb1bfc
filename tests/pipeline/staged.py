"""What tests of stages share: an untrained checkpoint, and running a stage in this process."""

import dataclasses

from conftest import one_cpu

from pipeline import checkpoint


def with_weights(experiment, run, scale=1.0):
    """A checkpoint of the untrained network, at the step that is sampled."""
    tensors = {name: t * scale for name, t in checkpoint.new_network(experiment).state_dict().items()}
    raw = {f"net.{name}": tensor for name, tensor in tensors.items()}
    checkpoint.save(run.step_dir(experiment.train.steps), raw, tensors, experiment.train.steps)


def asking_for(experiment, **changes):
    return dataclasses.replace(experiment, sample=dataclasses.replace(experiment.sample, **changes))


def run_stage(stage, experiment, run):
    """Run the stage; the names of its units."""
    ran = []
    for units in stage.work(experiment, run):
        one_cpu().map_units(units, lambda unit: ran.append(unit.name))
    return ran

"""The time that a full run would take at the rates measured in this one."""

from pipeline.compute.costs import read_costs
from pipeline.console import format_duration
from pipeline.report import paper
from pipeline.report.run_files import RunFiles


def project_full_run(run: RunFiles) -> list[list[str]]:
    """List the parts of a full run with pace, amount and time; on CIFAR-10 the amounts are the paper's."""
    e, rows, spent = run.experiment, [], read_costs(run.place.spent_json)
    if run.images_per_second:
        steps = paper.STEPS if run.is_cifar10 else e.train.steps
        pace = run.images_per_second / e.train.batch_size
        rows.append(["Training", f"{pace:,.2f} steps/s", f"{steps:,} steps", format_duration(steps / pace)])
    chains = spent.get("samples")
    if chains:  # the chain measured at most, stretched to the length of the full one
        length, chain = max(chains.items(), key=lambda item: item[1]["images"])
        n = paper.SAMPLES if run.is_cifar10 else e.sample.num_images
        steps = e.diffusion.timesteps if run.is_cifar10 else e.sample.steps or e.diffusion.timesteps
        pace = chain["images"] / chain["seconds"]
        measured = f"{pace:,.2f} images/s of {int(length):,} steps"
        projected = format_duration(n / pace * steps / int(length))
        rows.append(["Sampling", measured, f"{n:,} images of {steps:,} steps", projected])
    bounds = spent.get("nll", {}).values()  # it takes all T terms, however samples are drawn
    images, seconds = sum(cost["images"] for cost in bounds), sum(cost["seconds"] for cost in bounds)
    if images:
        n = paper.TEST_IMAGES if run.is_cifar10 else e.evaluate.nll_images or images
        measured = f"{images / seconds:,.2f} images/s"
        rows.append(["NLL bound", measured, f"{n:,} images", format_duration(n * seconds / images)])
    return rows

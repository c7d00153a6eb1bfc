"""What a full run would take, at the rates that this one was measured at."""

from pipeline.console import format_duration
from pipeline.report import paper
from pipeline.report.source import Source


def project_full_run(source: Source) -> list[list[str]]:
    """List what is to do, the pace and the time: the paper's counts for its own images, else what the experiment
    asks for."""
    e, rows = source.experiment, []
    if source.rate:
        steps = paper.STEPS if source.is_cifar10 else e.train.steps
        pace = source.rate / e.train.batch_size
        rows.append(["Training", f"{pace:,.2f} steps/s", f"{steps:,} steps", format_duration(steps / pace)])
    chains = source.spent.get("samples")
    if chains:  # the chain measured at most, stretched to the length of the full one
        length, chain = max(chains.items(), key=lambda item: item[1]["images"])
        n = paper.SAMPLES if source.is_cifar10 else e.sample.num_images
        steps = e.diffusion.timesteps if source.is_cifar10 else e.sample.steps or e.diffusion.timesteps
        pace = chain["images"] / chain["seconds"]
        measured = f"{pace:,.2f} images/s of {int(length):,} steps"
        projected = format_duration(n / pace * steps / int(length))
        rows.append(["Sampling", measured, f"{n:,} images of {steps:,} steps", projected])
    bounds = source.spent.get("nll", {}).values()  # it takes all T terms, however samples are drawn
    images, seconds = sum(cost["images"] for cost in bounds), sum(cost["seconds"] for cost in bounds)
    if images:
        n = paper.TEST_IMAGES if source.is_cifar10 else e.evaluate.nll_images or images
        measured = f"{images / seconds:,.2f} images/s"
        rows.append(["NLL bound", measured, f"{n:,} images", format_duration(n * seconds / images)])
    return rows

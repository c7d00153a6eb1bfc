"""The commands of `ddpm`: one function each, from parsed arguments to an exit code (None = 0).

Functions import modules when they need them, most of them after the configuration is checked.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import arguments
from pipeline.console import print_line
from pipeline.errors import ConfigError, PipelineError, hide_password, suggest

if TYPE_CHECKING:
    from pipeline.config import ClusterConfig
    from pipeline.store.run import Place
    from pipeline.sweep.definition import Sweep
    from pipeline.sweep.points import SweepPoint
    from pipeline.sweep.study import Study

MANY = 200  # trials; a sweep of more is often a mistake
NAME, ALIAS = r"[^/:']+", r"(?!(latest|v\d+)$)[\w-]+"  # of models in MLflow

# The cluster of a command, and its paths that would mean another file on another machine.
JobInputs = tuple["ClusterConfig", list[str]]


# One run


def run_experiment(options: Namespace) -> None:
    experiment, cluster = arguments.load_experiment_and_cluster(options)
    from pipeline import tracking
    from pipeline.engine.execute import run_stages
    from pipeline.report.run_files import RunFiles
    from pipeline.report.run_page import describe_run
    from pipeline.store.selection import fill_in_selection

    last = {"run": "report", "import": "train"}.get(options.command.name, options.command.name)
    place = run_stages(experiment, cluster, last, getattr(options, "accept_code", False))
    if headline := fill_in_selection(place):  # None before the best checkpoint is known
        print_line(describe_run(RunFiles(headline)).replace("**", ""))
    print_line(f"       run: {place.path}")
    if place.report_html.exists():
        print_line(f"    report: {place.report_html.as_uri()}")
    delivery = tracking.describe_delivery(place, cluster.tracking_uri, cluster.largest_model)
    print_line(f"    MLflow: {delivery}")


def check_submitted_run(options: Namespace) -> JobInputs:
    """Check `ddpm run` before it is sent as a job; return the inputs of the job."""
    experiment, cluster = arguments.load_experiment_and_cluster(options)
    from pipeline import config

    config.require_images_for_workers(experiment.train, cluster.workers or 1)
    name, overrides = arguments.split_arguments(options, "experiment")
    return cluster, config.find_relative_paths(name or options.command.default, overrides)


def import_weights(options: Namespace) -> None:
    options.words = [*options.words, f"published.path={options.path}", f"published.weights={options.weights}"]
    run_experiment(options)


def show_experiment(options: Namespace) -> None:
    experiment, cluster = arguments.load_experiment_and_cluster(options)
    from pipeline import config
    from pipeline.engine import find
    from pipeline.store.selection import fill_in_selection

    print(config.to_yaml(experiment), end="")
    tracking, ray = (hide_password(uri or "") or None for uri in (cluster.tracking_uri, cluster.ray_address))
    print("\n# cluster\n" + config.to_yaml(replace(cluster, tracking_uri=tracking, ray_address=ray)), end="")
    for warning in experiment.list_warnings():
        print(f"# warning: {warning}")
    try:
        place = find.make_place(experiment, cluster.storage_root, remember=False)
    except PipelineError as error:
        print(f"\n# keys: not known: {error}")
        return
    print(f"\n# data key    {place.data_key}\n# run key     {place.run_key}")
    if found := fill_in_selection(place):
        if rule := found.experiment.checkpoint_rule:
            print(f"# checkpoint  {found.experiment.checkpoint_step}, {rule}")
        print(f"# sample key  {found.sample_key}\n# score key   {found.score_key}")
    else:
        print("# sample key  not known before the best checkpoint is selected; so is the score key")
    print(f"# directory   {place.path}")


def show_configurations(options: Namespace) -> None:
    from pipeline.config import FOLDERS, find_configuration, list_configurations

    width = max(12, shutil.get_terminal_size().columns - 28)
    for folder in FOLDERS:
        print(f"{folder or 'experiment'}s:")
        for name in list_configurations(folder):
            first = find_configuration(name, folder).read_bytes().partition(b"\n")[0]
            text = first.decode(errors="backslashreplace").strip("# ")
            print(f"  {name:<25} {textwrap.shorten(text, width, placeholder=' ...')}")


# Studies


def _load_sweep(options: Namespace) -> tuple[Sweep, list[str], list[SweepPoint], ClusterConfig]:
    """Load the sweep of the command, the overrides of all its trials, its points, and the cluster."""
    from pipeline.sweep.definition import load_sweep
    from pipeline.sweep.points import list_points

    if options.command.name == "reproduce":
        from pipeline.sweep.reproduction import SWEEPS, parse_budget

        parse_budget(options.budget)
        name, own, shared = SWEEPS[options.target], [], arguments.list_non_cluster_arguments(options)
    else:
        given, overrides = arguments.split_arguments(options, "sweep")
        if given is None:
            raise ConfigError("which sweep? Give its name, as in `ddpm sweep digits_beta_dropout`")
        name = given
        own = [word.removeprefix("sweep.") for word in overrides if word.startswith("sweep.")]
        shared = [word for word in overrides if not word.startswith("sweep.")]
    sweep, cluster = load_sweep(name, own), arguments.load_cluster(options)
    if sweep.count > MANY and not options.yes:
        raise ConfigError(f"{sweep.name} has {sweep.count:,} trials; if that is meant, say --yes")
    return sweep, shared, list_points(sweep, shared), cluster


def run_sweep(options: Namespace) -> int:
    sweep, _, points, cluster = _load_sweep(options)
    from pipeline.sweep.study import Study

    return _run_study(Study(sweep, points, cluster), options)


def check_submitted_study(options: Namespace) -> JobInputs:
    """Check `ddpm sweep` or `ddpm reproduce` before it is sent as a job; return the inputs of the job."""
    from pipeline.sweep.points import find_relative_sweep_paths

    sweep, shared, _, cluster = _load_sweep(options)
    return cluster, find_relative_sweep_paths(sweep, shared)


def run_reproduction(options: Namespace) -> int:
    cluster = arguments.load_cluster(options)
    from pipeline.sweep.reproduction import plan_reproduction

    shared = arguments.list_non_cluster_arguments(options)
    study = plan_reproduction(options.target, options.budget, shared, cluster, options.dry_run)
    return _run_study(study, options)


def _run_study(study: Study, options: Namespace) -> int:
    from pipeline.sweep.leaderboard import format_text

    if options.dry_run:
        print(study.describe_plan())
        return 0
    board = study.run(options.accept_code)
    print(format_text(board))
    for what, where in study.list_links():
        print_line(f"{what:>11}: {where}")
    if rest := study.describe_unstarted_trials():
        print_line(rest)
    for line in board.failures:
        print(f"error: {line}", file=sys.stderr)
    return 1 if board.failures else 0


# Finished runs


def show_status(options: Namespace) -> None:
    from pipeline.cli.status import format_status

    root = arguments.load_cluster(options, alone=True).storage_root
    with suppress(KeyboardInterrupt):
        while options.watch:
            print(f"\033[H\033[2J{format_status(root)}", flush=True)  # from the top of an empty screen
            time.sleep(3)
    print(format_status(root))


def compare_runs(options: Namespace) -> None:
    from pipeline.engine import find
    from pipeline.scores.metrics import METRICS, find_metric
    from pipeline.store.run import locate_comparison

    metric = find_metric(options.metric)
    if metric is None:
        hint = suggest(options.metric, METRICS)
        raise ConfigError(f"--metric {options.metric} is unknown{hint}; known: {', '.join(METRICS)}")
    root, names = arguments.prepare_root(options, alone=False), arguments.list_non_cluster_arguments(options)
    paths = list(dict.fromkeys(path for name in names for path in find.find_named_runs(name, root)))
    if len(paths) < 2:
        found = f"only {paths[0].name}" if paths else "no run"
        raise ConfigError(f"compare needs two runs or more, and {found} is named")
    from pipeline.report import compared_run, comparison

    runs = compared_run.make_compared_runs(map(find.read_place, paths))
    folder = locate_comparison(root, comparison.make_comparison_key(runs, metric))
    page = comparison.write_comparison(runs, folder, "Comparison", metric)
    print_line(f"comparison: {page.as_uri()}")


def draw_images(options: Namespace) -> None:
    from pipeline.cli import draw

    named = [*arguments.list_non_cluster_arguments(options), *filter(None, [options.out])]
    if len(named) > 1:
        raise ConfigError(f"one output at a time, not {' and '.join(named)}")
    out = Path(named[0] if named else "samples.png").expanduser()
    draw.draw_images(options, arguments.load_cluster(options), out)


def export_weights(options: Namespace) -> None:
    from pipeline import tracking
    from pipeline.engine.find import find_run, read_place
    from pipeline.report.run_page import write_card
    from pipeline.store import diffusers_layout, files

    cluster = arguments.load_cluster(options, alone=True)
    files.require_output(folder := Path(options.directory).expanduser().absolute(), folder=True)
    place = None
    if options.run.startswith(tracking.PREFIX):
        if options.step is not None or options.weights != "ema":
            raise ConfigError(f"{options.run} is one set of weights: leave out --step and --weights")
        exported, settings, tensors = tracking.fetch_model(options.run, tracking.find_uri(cluster))
        kind, source = exported.published.weights or exported.sample.weights, settings["source"]
        diffusers_layout.write_folder(exported, tensors, folder, kind, source)
    else:
        place = read_place(find_run(options.run, cluster.storage_root))
        exported, source = diffusers_layout.export_to_diffusers(place, folder, options.weights, options.step)
    write_card(folder, exported, source, place)
    print_line(f"{folder}: {source}")


def remove_runs(options: Namespace) -> int:
    """Delete runs or sample sets (`ddpm rm`)."""
    from pipeline.cli import remove

    return remove.remove_runs(options)


def register_model(options: Namespace) -> None:
    for option, given, rule in (("--name", options.name, NAME), ("--alias", options.alias, ALIAS)):
        if given is not None and not re.fullmatch(rule, given, re.ASCII | re.IGNORECASE):
            raise ConfigError(
                f"{option} '{given}' is none that MLflow takes: use letters, digits, - and _, not 'v1'"
            )
    from pipeline import tracking
    from pipeline.engine.load import choose_checkpoint

    with _open_for_delivery(options) as (run, cluster):
        place = choose_checkpoint(run)
        step, name = place.experiment.checkpoint_step, options.name or place.experiment.name
        address = tracking.register_run(tracking.find_uri(cluster), place, step, name, options.alias)
    print_line(f"{address}: {place.experiment.weights_kind} weights of step {step} of {place.name}")
    print_line(f"it draws: mlflow.pyfunc.load_model('{address}').predict({{'n': 16, 'seed': 0}})")


def sync_run(options: Namespace) -> None:
    from pipeline import tracking

    with _open_for_delivery(options) as (place, cluster):
        uri = tracking.find_uri(cluster)
        print_line(tracking.deliver_run(uri, place.experiment.name, place, cluster.largest_model))


@contextmanager
def _open_for_delivery(options: Namespace) -> Iterator[tuple[Place, ClusterConfig]]:
    """Lock the run that the command names, and check the tracking server of its cluster."""
    cluster = arguments.load_cluster(options, alone=True)
    from pipeline import tracking
    from pipeline.engine import find
    from pipeline.store.files import lock_folder

    place = find.read_place(find.find_run(options.run, cluster.storage_root))
    tracking.check_server(tracking.find_uri(cluster))
    with lock_folder(place.path):
        yield place, cluster


def push_run(options: Namespace) -> None:
    from pipeline.engine.find import find_run
    from pipeline.store import remote

    root = arguments.prepare_root(options)
    name = options.run if "/" in options.run else str(find_run(options.run, root))  # data/NAME is no run
    print_line(remote.push_run(name, root, options.uri))


def pull_run(options: Namespace) -> None:
    from pipeline.store import remote

    print_line(remote.pull_run(options.uri, arguments.prepare_root(options)))


# Jobs, servers, this machine


def submit_job(options: Namespace) -> int:
    from pipeline.jobs import job_commands as jobs
    from pipeline.jobs.rayjob import make_rayjob

    if options.words or not options.job:
        raise ConfigError("write the command after --, as in: ddpm submit --follow -- run digits")
    prepare = options.job_options.command.prepare_submit
    if prepare is None:
        raise ConfigError(f"'{options.job[0]}' cannot be submitted: it shows or moves files of this machine")
    if options.cluster and "--cluster" not in options.job:
        options.job_options.cluster = options.cluster
        options.job += ["--cluster", options.cluster]
    cluster, relative = prepare(options.job_options)
    if options.cluster:
        labels = {"queue-name": options.queue, "priority-class": options.priority}
        print(make_rayjob(options.job, cluster, relative, Path(options.template), labels, options.hours))
        return 0
    return jobs.submit_job(options.job, cluster, relative, options.address, options.id, options.follow)


def run_job_command(options: Namespace) -> int:
    from pipeline.jobs import job_commands as jobs

    action, name, address = options.action, options.job_id, options.address
    if bool(name) != (action != "list"):
        raise ConfigError(f"`ddpm jobs {action}` takes {'no' if action == 'list' else 'one'} job id")
    if options.follow and action != "logs":
        raise ConfigError("--follow belongs to `ddpm jobs logs ID`")
    if action == "list":
        return jobs.show_jobs(address)
    if action == "logs":
        return jobs.show_log(name, address, options.follow)
    return (jobs.show_job_status if action == "status" else jobs.stop_job)(name, address)


def serve_ui(options: Namespace) -> int:
    from pipeline.tracking import ui

    root, cluster = arguments.prepare_root(options), arguments.load_cluster(options)
    return ui.serve_ui(root, options.port, uri=cluster.tracking_uri)


def show_diagnosis(options: Namespace) -> None:
    experiment = None
    if arguments.list_non_cluster_arguments(options):
        experiment, cluster = arguments.load_experiment_and_cluster(options)
    else:
        cluster = arguments.load_cluster(options)
    from pipeline.cli.status import diagnose

    print(diagnose(cluster))
    if experiment and experiment.is_trained:
        from pipeline.compute.memory import describe_step_memory

        print(f"a training step   {describe_step_memory(experiment, cluster.workers or 1)}")

"""What each command of `ddpm` does with its parsed words.

Imports stand inside, after what a wrong configuration is told by: a command loads what it needs when it needs it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import print_line
from pipeline.errors import ConfigError, PipelineError, suggest

if TYPE_CHECKING:
    from pipeline.config import ClusterConfig, Experiment
    from pipeline.store.run import Place
    from pipeline.sweep.definition import Sweep
    from pipeline.sweep.points import SweepPoint
    from pipeline.sweep.study import Study

MANY = 200  # trials; more are rarely meant

# The cluster that a command line means, and its paths that mean something else on another machine.
Checked = tuple["ClusterConfig", list[str]]


def version() -> str:
    """Return the version of the installed program."""
    from importlib import metadata

    try:
        return metadata.version("ddpm-pipeline")
    except metadata.PackageNotFoundError:
        return "from a checkout that is not installed"


# Words of a command line


def _list_words(options: Namespace) -> list[str]:
    """Return the words that are not the cluster's."""
    return [word for word in options.words if not word.startswith("cluster.")]


def _split_words(options: Namespace, kind: str) -> tuple[str | None, list[str]]:
    """Return the one name that is given, if any, and the overrides."""
    words = _list_words(options)
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise ConfigError(f"one {kind} at a time, not {' and '.join(names)}; overrides are written key=value")
    return (names[0] if names else None), [word for word in words if "=" in word]


def _load_cluster(options: Namespace) -> ClusterConfig:
    from pipeline import config

    own = [word.removeprefix("cluster.") for word in options.words if word.startswith("cluster.")]
    return config.load_cluster(options.cluster, own)


def _load_cluster_only(options: Namespace) -> ClusterConfig:
    if stray := _list_words(options):
        raise ConfigError(f"'{stray[0]}' is not understood here; only cluster.key=value is")
    return _load_cluster(options)


def _load(options: Namespace) -> tuple[Experiment, ClusterConfig]:
    """Read the experiment and the cluster that the command line names; the faults of both are told at once."""
    from pipeline import config
    from pipeline.engine.names import list_known_names

    name, overrides = _split_words(options, "experiment")
    problems: list[str] = []
    try:
        experiment = config.load_experiment(name or options.command.default, overrides, list_known_names())
    except ConfigError as error:
        problems += error.problems
    try:
        cluster = _load_cluster(options)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return experiment, cluster


# The stages of one run


def run_command(options: Namespace) -> int:
    """`ddpm run` and the commands that are named like a stage."""
    experiment, cluster = _load(options)
    from pipeline import tracking
    from pipeline.engine.execute import run_stages

    last = {"run": "report", "import": "train"}.get(options.command.name, options.command.name)
    place = run_stages(experiment, cluster, last)
    print_line(f"       run: {place.path}")
    print_line(f"    MLflow: {tracking.describe_delivery(place, cluster.tracking_uri)}")
    if place.report_html.exists():
        print_line(f"    report: {place.report_html}")
    return 0


def check_experiment(options: Namespace) -> Checked:
    experiment, cluster = _load(options)
    from pipeline import config

    config.require_images_for_workers(experiment.train, cluster.workers or 1)
    name, overrides = _split_words(options, "experiment")
    return cluster, config.find_relative_paths(name or options.command.default, overrides)


def show(options: Namespace) -> int:
    experiment, cluster = _load(options)
    from pipeline import config
    from pipeline.engine import find

    print(config.to_yaml(experiment), end="")
    print("\n# cluster\n" + config.to_yaml(cluster), end="")
    for warning in experiment.diffusion.list_warnings():
        print(f"# warning: {warning}")
    try:
        place = find.make_place(experiment, cluster.storage_root)
    except PipelineError as error:
        print(f"\n# keys: not known: {error}")
        return 0
    print(f"\n# data key    {place.data_key}\n# run key     {place.run_key}")
    print("\n".join(f"# {line}" for line in _list_later_keys(place)))
    print(f"# directory   {place.path}")
    return 0


def _list_later_keys(place: Place) -> list[str]:
    """List the keys that depend on the checkpoint, once it is known."""
    from pipeline.store import selection

    found = selection.fill_in_selection(place)
    if found is None:
        return ["sample key  not known before the best checkpoint is chosen; so is the score key"]
    lines = [f"sample key  {found.sample_key}", f"score key   {found.score_key}"]
    rule = found.experiment.checkpoint_rule
    return [f"checkpoint  {found.experiment.checkpoint_step}, {rule}", *lines] if rule else lines


def import_weights(options: Namespace) -> int:
    options.words = [*options.words, f"published.path={options.path}", f"published.weights={options.weights}"]
    return run_command(options)


# Studies


def _load_sweep(options: Namespace) -> tuple[Sweep, list[str], list[SweepPoint], ClusterConfig]:
    """Read the sweep that the command line names, the overrides of all its trials, its points, and the cluster."""
    from pipeline.sweep.definition import load_sweep
    from pipeline.sweep.points import list_points

    name, overrides = _split_words(options, "sweep")
    if name is None:
        raise ConfigError("which sweep? Give its name, as in `ddpm sweep digits_beta_dropout`")
    own = [word.removeprefix("sweep.") for word in overrides if word.startswith("sweep.")]
    sweep, cluster = load_sweep(name, own), _load_cluster(options)
    if sweep.count > MANY and not options.yes:
        raise ConfigError(f"{sweep.name} has {sweep.count:,} trials; if that is meant, say --yes")
    shared = [word for word in overrides if not word.startswith("sweep.")]
    return sweep, shared, list_points(sweep, shared), cluster


def sweep(options: Namespace) -> int:
    sweep, _, points, cluster = _load_sweep(options)
    from pipeline.sweep.study import Study

    return _run_study(Study(sweep, points, cluster), options)


def check_sweep(options: Namespace) -> Checked:
    from pipeline.sweep.points import list_sweep_paths

    sweep, shared, _, cluster = _load_sweep(options)
    return cluster, list_sweep_paths(sweep, shared)


def reproduce(options: Namespace) -> int:
    cluster = _load_cluster(options)
    from pipeline.sweep.reproduction import plan_reproduction

    shared = _list_words(options)
    study = plan_reproduction(options.target, options.budget, shared, cluster, options.dry_run)
    return _run_study(study, options)


def check_reproduction(options: Namespace) -> Checked:
    from pipeline.sweep.definition import load_sweep
    from pipeline.sweep.points import list_points, list_sweep_paths
    from pipeline.sweep.reproduction import SWEEPS, parse_budget

    cluster, shared = _load_cluster(options), _list_words(options)
    parse_budget(options.budget)
    sweep = load_sweep(SWEEPS[options.target], [])
    list_points(sweep, shared)
    return cluster, list_sweep_paths(sweep, shared)


def _run_study(study: Study, options: Namespace) -> int:
    from pipeline.sweep.leaderboard import format_text

    if options.dry_run:
        print(study.describe_plan())
        return 0
    board = study.run()
    print(format_text(board))
    for what, where in study.list_links():
        print_line(f"{what:>11}: {where}")
    if rest := study.describe_unstarted_trials():
        print_line(rest)
    for line in board.failures:
        print(f"error: {line}", file=sys.stderr)
    return 1 if board.failures else 0


# Runs that are there


def status(options: Namespace) -> int:
    from pipeline.cli import status

    print(status.format_status(_load_cluster_only(options).storage_root))
    return 0


def compare(options: Namespace) -> int:
    from pipeline.engine import find
    from pipeline.scores.metrics import METRICS, find_metric
    from pipeline.store.run import locate_comparison

    metric = find_metric(options.metric)
    if metric is None:
        hint = suggest(options.metric, METRICS)
        raise ConfigError(f"--metric {options.metric} is unknown{hint}; known: {', '.join(METRICS)}")
    root = find.prepare_storage_root(_load_cluster(options))
    paths = dict.fromkeys(path for name in _list_words(options) for path in find.find_named_runs(name, root))
    if len(paths) < 2:
        found = f"only {next(iter(paths)).name}" if paths else "no run"
        raise ConfigError(f"compare needs two runs or more, and {found} is named")
    from pipeline.report import compared_run, comparison

    runs = compared_run.list_compared_runs(find.read_place(path) for path in paths)
    folder = locate_comparison(root, comparison.hash_comparison(runs, metric))
    print_line(f"comparison: {comparison.write_comparison(runs, folder, 'Comparison', metric)}")
    return 0


def export_weights(options: Namespace) -> int:
    from pipeline.engine import find
    from pipeline.store import diffusers_layout

    path = find.find_run(options.run, find.prepare_storage_root(_load_cluster_only(options)))
    folder = Path(options.directory).expanduser().absolute()
    print_line(diffusers_layout.export_to_diffusers(path, folder, options.weights, options.step))
    return 0


def sync(options: Namespace) -> int:
    cluster = _load_cluster_only(options)
    from pipeline import tracking
    from pipeline.engine import find
    from pipeline.store.files import lock_folder

    place = find.read_place(find.find_run(options.run, cluster.storage_root))
    uri = cluster.tracking_uri or tracking.find_default_uri(place.storage)
    tracking.check_server(uri)
    with lock_folder(place.path):
        print_line(tracking.deliver_run(uri, place.experiment.name, place))
    return 0


def push(options: Namespace) -> int:
    from pipeline.engine import find
    from pipeline.store import remote

    root = find.prepare_storage_root(_load_cluster_only(options))
    name = options.run if "/" in options.run else str(find.find_run(options.run, root))  # data/NAME is no run
    print_line(remote.push_run(name, root, options.uri))
    return 0


def pull(options: Namespace) -> int:
    from pipeline.engine import find
    from pipeline.store import remote

    print_line(remote.pull_run(options.uri, find.prepare_storage_root(_load_cluster_only(options))))
    return 0


# Jobs, servers, this machine


def submit(options: Namespace) -> int:
    from pipeline.jobs import job_commands as jobs

    if options.words or not options.job:
        raise ConfigError("write the command after --, as in: ddpm submit --follow -- run digits")
    check = options.job_options.command.check
    if check is None:
        raise ConfigError(f"'{options.job[0]}' cannot be submitted: it shows or moves what is here")
    cluster, relative = check(options.job_options)
    return jobs.submit_job(options.job, cluster, relative, options.address, options.id, options.follow)


def jobs(options: Namespace) -> int:
    from pipeline.jobs import job_commands as jobs

    action, *names = options.words or ["list"]
    if action not in ("list", "logs", "status", "stop"):
        raise ConfigError(f"'{action}' is unknown; `ddpm jobs` knows list, logs ID, status ID and stop ID")
    if len(names) != (action != "list"):
        raise ConfigError(f"`ddpm jobs {action}` takes {'no' if action == 'list' else 'one'} job id")
    if options.follow and action != "logs":
        raise ConfigError("--follow belongs to `ddpm jobs logs ID`")
    if action == "list":
        return jobs.list_jobs(options.address)
    if action == "logs":
        return jobs.show_log(names[0], options.address, options.follow)
    return (jobs.show_status if action == "status" else jobs.stop_job)(names[0], options.address)


def ui(options: Namespace) -> int:
    cluster = _load_cluster_only(options)
    from pipeline import tracking
    from pipeline.engine import find

    return tracking.serve_ui(find.prepare_storage_root(cluster), options.port, uri=cluster.tracking_uri)


def doctor(options: Namespace) -> int:
    from pipeline.cli import status

    print(status.diagnose(_load_cluster_only(options)))
    return 0

"""What each command of `ddpm` does with its parsed words. Imports stand inside: a command loads what it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipeline.console import say
from pipeline.errors import ConfigError, PipelineError

MANY = 200  # trials; more are rarely meant


def _load(options: Any) -> tuple[Any, Any]:
    """The experiment and the cluster that the command line names, with the faults of both reported at once."""
    from pipeline import config
    from pipeline.engine.names import known_names

    name, own = _experiment_words(options)
    loaded, problems = [], []
    for load in (
        lambda: config.load_experiment(name, own, known_names()),
        lambda: _load_cluster(options.cluster, options.arguments),
    ):
        try:
            loaded.append(load())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return loaded[0], loaded[1]


def _experiment_words(options: Any) -> tuple[str, list[str]]:
    """The experiment that the command line names, and its overrides."""
    named, overrides = _words(options, "experiment")
    own = [word for word in overrides if not word.startswith("cluster.")]
    return named[0] if named else options.default, own


def _words(options: Any, kind: str) -> tuple[list[str], list[str]]:
    """The name that the command line gives, if any, and the overrides."""
    named = [word for word in options.arguments if "=" not in word]
    if len(named) > 1:
        raise ConfigError(f"one {kind} at a time, not {' and '.join(named)}; overrides are written key=value")
    return named, [word for word in options.arguments if "=" in word]


def _load_cluster(name: str, overrides: list[str]) -> Any:
    from pipeline import config

    return config.load_cluster(
        name, [word.removeprefix("cluster.") for word in overrides if word.startswith("cluster.")]
    )


def _cluster_only(options: Any) -> Any:
    stray = [word for word in options.overrides if not word.startswith("cluster.")]
    if stray:
        raise ConfigError(f"'{stray[0]}' is not understood here; only cluster.key=value is")
    return _load_cluster(options.cluster, options.overrides)


def stage(options: Any) -> int:
    from pipeline.engine import execute as stages

    experiment, cluster = _load(options)
    run = stages.execute(experiment, cluster, options.last)
    for what, where in stages.whereabouts(run, cluster):
        say(f"{what:>10}: {where}")
    return 0


def check_stage(options: Any) -> tuple[Any, list[str]]:
    """The cluster that a command line means, and its paths that mean something else elsewhere; starts nothing."""
    from pipeline import config
    from pipeline.engine import execute as stages

    experiment, cluster = _load(options)
    stages.check(experiment, cluster)
    return cluster, config.relative_paths(*_experiment_words(options))


def submit(options: Any) -> int:
    from pipeline import jobs

    if options.arguments or not options.job:
        raise ConfigError("write the command after --, as in: ddpm submit --follow -- run digits")
    job = options.job_options
    if "check" not in job:
        raise ConfigError(f"'{options.job[0]}' cannot be submitted: it shows or moves what is here")
    cluster, relative = job.check(job)
    return jobs.submit(options.job, cluster, relative, options.address, options.id, options.follow)


def jobs(options: Any) -> int:
    from pipeline import jobs

    action, *names = options.arguments or ["list"]
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
    return (jobs.show_status if action == "status" else jobs.stop)(names[0], options.address)


def _load_sweep(options: Any) -> tuple[Any, list[str], Any]:
    """The sweep that the command line names, the overrides of all its trials, and the cluster."""
    from pipeline.sweep.definition import load_sweep

    named, overrides = _words(options, "sweep")
    if not named:
        raise ConfigError("which sweep? Give its name, as in `ddpm sweep digits_beta_dropout`")
    own = [word.removeprefix("sweep.") for word in overrides if word.startswith("sweep.")]
    shared = [word for word in overrides if not word.startswith(("sweep.", "cluster."))]
    sweep, cluster = load_sweep(named[0], own), _load_cluster(options.cluster, overrides)
    if sweep.size > MANY and not options.yes:
        raise ConfigError(f"{sweep.name} has {sweep.size:,} trials; if that is meant, say --yes")
    return sweep, shared, cluster


def sweep(options: Any) -> int:
    from pipeline.sweep.points import list_points
    from pipeline.sweep.study import Study

    sweep, shared, cluster = _load_sweep(options)
    return _run_study(Study(sweep, list_points(sweep, shared), cluster), options)


def check_sweep(options: Any) -> tuple[Any, list[str]]:
    """As `check_stage`, for all trials."""
    from pipeline.sweep.points import list_points, list_relative_paths

    sweep, shared, cluster = _load_sweep(options)
    list_points(sweep, shared)
    return cluster, list_relative_paths(sweep, shared)


def _load_reproduction(options: Any) -> tuple[list[str], Any]:
    """The overrides of all rows, and the cluster."""
    named, overrides = _words(options, "target")
    if named:
        raise ConfigError(f"'{named[0]}' is no override; write key=value")
    shared = [word for word in overrides if not word.startswith("cluster.")]
    return shared, _load_cluster(options.cluster, overrides)


def reproduce(options: Any) -> int:
    from pipeline.sweep.reproduce import plan_reproduction

    shared, cluster = _load_reproduction(options)
    return _run_study(
        plan_reproduction(options.target, options.budget, shared, cluster, options.dry_run), options
    )


def check_reproduction(options: Any) -> tuple[Any, list[str]]:
    """As `check_stage`, for all rows."""
    from pipeline.sweep.definition import load_sweep
    from pipeline.sweep.points import list_points, list_relative_paths
    from pipeline.sweep.reproduce import SWEEPS, parse_budget

    shared, cluster = _load_reproduction(options)
    parse_budget(options.budget)
    sweep = load_sweep(SWEEPS[options.target], [])
    list_points(sweep, shared)
    return cluster, list_relative_paths(sweep, shared)


def _run_study(study: Any, options: Any) -> int:
    from pipeline.sweep.leaderboard import to_text

    if options.dry_run:
        print(study.preview())
        return 0
    board = study.run()
    print(to_text(board))
    for what, where in study.list_places():
        say(f"{what:>11}: {where}")
    if rest := study.describe_rest():
        say(rest)
    for line in board.failures:
        print(f"error: {line}", file=sys.stderr)
    return 1 if board.failures else 0


def show(options: Any) -> int:
    from pipeline import config
    from pipeline.engine import execute as stages

    experiment, cluster = _load(options)
    print(config.to_yaml(experiment), end="")
    print("\n# cluster\n" + config.to_yaml(cluster), end="")
    for warning in experiment.diffusion.warnings():
        print(f"# warning: {warning}")
    try:
        run = stages.locate(experiment, Path(cluster.storage).expanduser().absolute())
    except PipelineError as error:
        print(f"\n# keys: not known: {error}")
        return 0
    print(f"\n# data key    {run.data_key}\n# run key     {run.run_key}")
    print("\n".join(f"# {line}" for line in _later_keys(experiment, run)))
    print(f"# directory   {run.path}")
    return 0


def _later_keys(experiment: Any, run: Any) -> list[str]:
    """Those that depend on the checkpoint, once it is known."""
    from pipeline import config
    from pipeline.store import keys, selection

    found = selection.resolved(experiment, run)
    if found is None:
        return ["sample key  not known before the best checkpoint is chosen; so is the score key"]
    lines = [
        f"sample key  {keys.sample_key(found, run.run_key)}",
        f"score key   {keys.evaluate_key(found, run.run_key)}",
    ]
    rule = config.checkpoint_rule(found)
    return [f"checkpoint  {config.checkpoint_step(found)}, {rule}", *lines] if rule else lines


def status(options: Any) -> int:
    from pipeline.cli import status

    print(status.table(Path(_cluster_only(options).storage).expanduser().absolute()))
    return 0


def compare(options: Any) -> int:
    from pipeline import config
    from pipeline.engine import execute as stages
    from pipeline.report import compare
    from pipeline.scores import metrics
    from pipeline.store.run import comparison_folder

    metric = metrics.find_metric(options.metric)
    if metric is None:
        hint, known = config.suggestion(options.metric, metrics.METRICS), ", ".join(metrics.METRICS)
        raise ConfigError(f"--metric {options.metric} is unknown{hint}; known: {known}")
    where = [word for word in options.arguments if word.startswith("cluster.")]
    root = stages.storage_root(_load_cluster(options.cluster, where))
    names = [word for word in options.arguments if word not in where]
    paths = dict.fromkeys(path for name in names for path in stages.run_directories(name, root))
    if len(paths) < 2:
        found = f"only {next(iter(paths)).name}" if paths else "no run"
        raise ConfigError(f"compare needs two runs or more, and {found} is named")
    runs = [stages.opened(path) for path in paths]
    entries = compare.list_entries(run.of(experiment) for experiment, run in runs)
    folder = comparison_folder(root, compare.hash_entries(entries, metric))
    say(f"comparison: {compare.write_comparison(entries, folder, 'Comparison', metric)}")
    return 0


def import_weights(options: Any) -> int:
    published = [f"published.path={options.path}", f"published.weights={options.weights}"]
    options.arguments = [*options.arguments, *published]
    return stage(options)


def export_weights(options: Any) -> int:
    from pipeline.engine import execute as stages
    from pipeline.store import diffusers_layout

    path = stages.run_directory(options.run, stages.storage_root(_cluster_only(options)))
    say(
        diffusers_layout.export(
            path, Path(options.directory).expanduser().absolute(), options.weights, options.step
        )
    )
    return 0


def sync(options: Any) -> int:
    from pipeline.engine import execute as stages

    cluster = _cluster_only(options)
    say(stages.sync(options.run, cluster))
    return 0


def push(options: Any) -> int:
    from pipeline.engine import execute as stages
    from pipeline.store import remote

    say(remote.push(options.name, stages.storage_root(_cluster_only(options)), options.uri))
    return 0


def pull(options: Any) -> int:
    from pipeline.engine import execute as stages
    from pipeline.store import remote

    say(remote.pull(options.uri, stages.storage_root(_cluster_only(options))))
    return 0


def ui(options: Any) -> int:
    from pipeline import tracking
    from pipeline.engine import execute as stages

    cluster = _cluster_only(options)
    return tracking.serve(stages.storage_root(cluster), options.port, uri=cluster.tracking_uri)


def doctor(options: Any) -> int:
    from pipeline.cli import status

    print(status.doctor(_cluster_only(options)))
    return 0

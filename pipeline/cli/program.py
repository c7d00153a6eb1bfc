"""The program `ddpm`: commands, overrides, exit codes (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from pipeline.cli import commands as does
from pipeline.errors import ConfigError, PipelineError

DEFAULT_EXPERIMENT = "digits"
PUBLISHED_EXPERIMENT = "cifar10_published"

STAGE_HELP = {
    "run": "shard, train, sample, evaluate, figures, report: whatever is not done yet",
    "shard": "write the images as webdataset tars",
    "train": "train the network (DDP; goes on from the newest checkpoint)",
    "sample": "draw samples from the trained network",
    "evaluate": "compute FID, IS and the NLL bound, each with its protocol",
    "figures": "draw the paper's figures",
    "report": "write report.html and report.md from what is there",
}

EPILOG = """\
EXPERIMENT and CLUSTER are paths, or names of files in ./conf (see `ddpm show`). key=value overrides one key
of the experiment, cluster.key=value one of the cluster:

  ddpm run                                            the digits, in minutes on two cores
  ddpm run cifar10 data.path=FOLDER                   the paper's CIFAR-10 experiment
  ddpm run cifar10 train.steps=20000 train.ema_warmup=true sample.num_images=5000
  ddpm run digits cluster.workers=2 cluster.storage=/data/runs
  ddpm submit --follow -- run cifar10 --cluster CLUSTER      the same command as a job on a cluster

The same command again goes on where it was interrupted, and does nothing where everything is up to date.
"""


SWEEP_EPILOG = """\
SWEEP is a path, or the name of a file in ./conf/sweep, which says what varies:

  experiment: digits                                  what every trial starts from
  space:
    diffusion.beta_schedule: [linear, cosine]         any keys of the experiment, each with its values
    model.dropout: [0.0, 0.2]
  rank: {metric: fid}                                 what the leaderboard is ordered by

  ddpm sweep digits_beta_dropout --dry-run            the trials, what each may use, the time left
  ddpm sweep digits_beta_dropout                      eight small trials, in minutes on two cores
  ddpm sweep beta_dropout train.steps=20000           key=value is for all trials,
  ddpm sweep beta_dropout sweep.concurrent=4          sweep.key=value for the sweep,
  ddpm sweep beta_dropout cluster.workers=2           cluster.key=value for the place (workers are each trial's)
  ddpm ui                                             then look at it

conf/sweep/beta_dropout.yaml says every key of a sweep: random and quasi-random spaces, seeds, early stopping,
budgets. Finished trials are not repeated, broken ones are tried again, points added to the file are run.
"""

REPRODUCE_EPILOG = """\
  ddpm reproduce cifar10                     six rows of 800,000 steps, as in the paper
  ddpm reproduce cifar10 --budget 2h         what two hours allow on this cluster, by a measured rate
  ddpm reproduce cifar10 --budget 2000       2,000 steps each, on images and scores by the same share
  ddpm reproduce cifar10 --budget 200 evaluate.features=classifier data.path=FOLDER

The same command again goes on. A study that is shorter than the paper's says so in its first line.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    options = _parsed(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return options.command(options)
    except ConfigError as error:
        return _fail(error, 2, options.debug)
    except PipelineError as error:
        return _fail(error, 1, options.debug)
    except ModuleNotFoundError as error:
        if options.debug or (error.name or "").split(".")[0] in ("pipeline", "ddpm"):
            raise
        missing = f"{sys.executable} has no module {error.name}: install this program for it (pip install .)"
        return _fail(PipelineError(missing), 1, False)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is on disk", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        return 1
    except OSError as error:  # a full disk, a folder that cannot be written
        if options.debug:
            raise
        return _fail(PipelineError(f"{error.filename or 'a file'}: {error.strerror or error}"), 1, False)


def _fail(error: Exception, code: int, debug: bool) -> int:
    if debug:
        raise error
    print(f"error: {error}", file=sys.stderr)
    return code


def _parsed(arguments: list[str] | None) -> Any:
    """argparse loses words that follow an option; here they may stand anywhere. What follows `submit --` is a
    command line of its own: `options.job`, and what it means, `options.job_options`."""
    parser = _parser()
    own = sys.argv[1:] if arguments is None else list(arguments)
    cut = own.index("--") if own[:1] == ["submit"] and "--" in own else len(own)
    options, late = parser.parse_known_args(own[:cut])
    options.job = own[cut + 1 :]
    options.job_options = _parsed(options.job) if options.job else None
    if stray := [word for word in late if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    words = options.arguments if "arguments" in options else options.overrides
    words += late
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddpm",
        description="Denoising Diffusion Probabilistic Models, end to end.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in STAGE_HELP.items():
        command = _add(commands, name, text, does.stage)
        command.set_defaults(last="report" if name == "run" else name, check=does.check_stage)
        _takes_experiment(command)
    _takes_experiment(
        _add(commands, "show", "the resolved configuration and its keys; starts nothing", does.show)
    )
    _sweep_command(commands)
    _reproduce_command(commands)
    status = _add(commands, "status", "the runs, their stages, progress and scores", does.status)
    status.add_argument("overrides", nargs="*", metavar="cluster.key=value")
    _cluster_option(status)
    _import_command(commands)
    _export_command(commands)
    _compare_command(commands)
    sync = _add(commands, "sync", "deliver to the tracking server what it has not got", does.sync)
    sync.add_argument("run", metavar="RUN", help="a run directory, or its name in the storage root")
    sync.add_argument("overrides", nargs="*", metavar="cluster.key=value")
    _cluster_option(sync)
    _store_commands(commands)
    ui = _add(commands, "ui", "open the MLflow UI on this project's store", does.ui)
    ui.add_argument("--port", type=int, default=5000, help="default: 5000")
    ui.add_argument("overrides", nargs="*", metavar="cluster.key=value")
    _cluster_option(ui)
    _submit_command(commands)
    _jobs_command(commands)
    doctor = _add(
        commands, "doctor", "what this machine has, and what to do about what is missing", does.doctor
    )
    doctor.add_argument("overrides", nargs="*", metavar="cluster.key=value")
    _cluster_option(doctor)
    return parser


def _compare_command(commands: Any) -> None:
    command = _add(commands, "compare", "a report over several runs", does.compare)
    command.add_argument(
        "arguments",
        nargs="+",
        metavar="RUN",
        help="a run directory, its name in the storage root, or how the names of several begin",
    )
    command.add_argument(
        "--metric", default="fid", help="what they are ranked by: fid (default), is, nll, kid, ..."
    )
    _cluster_option(command)


def _import_command(commands: Any) -> None:
    command = _add(
        commands, "import", "published weights in the diffusers layout become a run", does.import_weights
    )
    command.add_argument("path", metavar="PATH", help="their folder: config.json and the weights, or unet/")
    command.add_argument(
        "--weights",
        choices=("raw", "ema", "unknown"),
        default="unknown",
        help="what their authors say they are",
    )
    _takes_experiment(command, PUBLISHED_EXPERIMENT)
    command.set_defaults(last="train")


def _export_command(commands: Any) -> None:
    command = _add(
        commands, "export", "a run's weights for diffusers' DDPMPipeline.from_pretrained", does.export_weights
    )
    command.add_argument("run", metavar="RUN", help="a run directory, or its name in the storage root")
    command.add_argument("directory", metavar="DIR", help="the folder to write; it must not exist yet")
    command.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: ema")
    command.add_argument("--step", type=int, help="default: the newest checkpoint")
    command.add_argument("overrides", nargs="*", metavar="cluster.key=value")
    _cluster_option(command)


def _submit_command(commands: Any) -> None:
    text = (
        "the same command as a Ray job on a cluster: ddpm submit [OPTIONS] -- run cifar10 --cluster CLUSTER"
    )
    command = _add(commands, "submit", text, does.submit)
    command.add_argument(
        "arguments", nargs="*", metavar="-- COMMAND", help="run, sweep, train, ... as always"
    )
    command.add_argument("--follow", action="store_true", help="write the job's log, and end as it ends")
    command.add_argument("--id", default="", metavar="NAME", help="default: the command and the time")
    _address_option(command)


def _jobs_command(commands: Any) -> None:
    command = _add(commands, "jobs", "a cluster's jobs: list them; a log; one's status; stop one", does.jobs)
    command.add_argument(
        "arguments", nargs="*", metavar="list | logs ID | status ID | stop ID", help="default: list"
    )
    command.add_argument(
        "--follow", action="store_true", help="with logs: until the job ends, and as it ends"
    )
    _address_option(command)


def _address_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265",
    )


def _store_commands(commands: Any) -> None:
    push = _add(
        commands, "push", "finished shards, checkpoints, samples and scores to an S3 store", does.push
    )
    push.add_argument(
        "name", metavar="RUN", help="a run directory or data/NAME, or its name in the storage root"
    )
    push.add_argument("uri", metavar="s3://BUCKET/PREFIX", help="what mirrors the storage root there")
    pull = _add(commands, "pull", "what was pushed, into the storage root", does.pull)
    pull.add_argument("uri", metavar="s3://BUCKET/PREFIX/RUN", help="what `push` named")
    for command in (push, pull):
        command.add_argument("overrides", nargs="*", metavar="cluster.key=value")
        _cluster_option(command)


def _sweep_command(commands: Any) -> None:
    text = "all trials of a sweep file, several at once; the same command again goes on"
    command = _add(commands, "sweep", text, does.sweep, SWEEP_EPILOG)
    command.add_argument(
        "arguments", nargs="*", metavar="SWEEP | key=value", help="a sweep, and any number of overrides"
    )
    command.set_defaults(check=does.check_sweep)
    _sweep_options(command)


def _reproduce_command(commands: Any) -> None:
    text = "the rows of the paper's Tables 1 and 2 as one study, at the paper's length or scaled to a budget"
    command = _add(commands, "reproduce", text, does.reproduce, REPRODUCE_EPILOG)
    command.add_argument("target", choices=("cifar10",), help="what to reproduce")
    command.add_argument(
        "arguments", nargs="*", metavar="key=value", help="overrides of every row, or cluster.key=value"
    )
    command.add_argument(
        "--budget", default="full", metavar="STEPS | TIME | full",
        help="steps of each row (2000), or a time for all rows together (2h, 30min); default: full",
    )  # fmt: skip
    command.set_defaults(check=does.check_reproduction)
    _sweep_options(command)


def _sweep_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry-run", action="store_true", help="list trials, resources and the time left; start nothing"
    )
    command.add_argument("--yes", action="store_true", help=f"really more than {does.MANY} trials")
    _cluster_option(command)


def _add(
    commands: Any, name: str, text: str, command: Callable[[Any], int], epilog: str = EPILOG
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=command)
    return parser


def _takes_experiment(parser: argparse.ArgumentParser, default: str = DEFAULT_EXPERIMENT) -> None:
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="EXPERIMENT | key=value",
        help=f"an experiment (default: {default}), and any number of overrides",
    )
    parser.set_defaults(default=default)
    _cluster_option(parser)


def _cluster_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", default="local", metavar="CLUSTER", help="where it runs (default: local)"
    )

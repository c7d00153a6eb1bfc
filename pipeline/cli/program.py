"""The program `ddpm`: commands, options, exit codes (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.cli import commands as do
from pipeline.console import drop_lost_outputs
from pipeline.errors import ConfigError, PipelineError, suggest

CONFIGURATIONS = """
EXPERIMENT and CLUSTER are paths, or names of files in ./conf. key=value overrides one key of the experiment,
cluster.key=value one of the cluster. `ddpm list` has all names, `ddpm show EXPERIMENT` all keys.
"""
GOES_ON = """
The same command again continues where it was interrupted, and does nothing if everything is up to date.
"""


Argument = tuple[tuple[str, ...], dict[str, Any]]  # its names and settings, for argparse's `add_argument`


@dataclass(frozen=True)
class Command:
    """One command: its function, its help, examples and arguments.

    prepare_submit: checks the arguments and starts nothing; commands that have it can be submitted as jobs.
    default: the experiment if the user names none.
    """

    name: str
    run: Callable[[Namespace], int | None]
    text: str
    examples: str
    arguments: tuple[Argument, ...]
    prepare_submit: Callable[[Namespace], do.JobInputs] | None = None
    default: str = "digits"


def _declare(*names: str, **settings: Any) -> Argument:
    return names, settings


def _parse_integer(least: int, most: int) -> Callable[[str], int]:
    """Return a function that parses a whole number between two bounds."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
            raise ArgumentTypeError(f"'{text}' is no whole number from {least} to {most}")
        return int(text)

    return read


def _declare_names(metavar: str, text: str) -> Argument:
    """Return an argument for any number of names and overrides."""
    return _declare("words", nargs="*", metavar=metavar, help=text)


CLUSTER = _declare("--cluster", default="local", metavar="CLUSTER", help="where it runs (default: local)")
CLUSTER_ONLY = (_declare_names("cluster.key=value", "of the cluster"), CLUSTER)
EXPERIMENT = (_declare_names("EXPERIMENT | key=value", "one experiment, many overrides"), CLUSTER)
ACCEPT_CODE = _declare(
    "--accept-code", action="store_true", help="continue a run that other code of ddpm/ trained or sampled"
)
RUN = _declare("run", metavar="RUN", help="a run directory, or how its name begins")
STUDY = (
    _declare("--dry-run", action="store_true", help="list trials, resources and time left; start nothing"),
    _declare("--yes", action="store_true", help=f"start more than {do.MANY} trials without asking"),
    ACCEPT_CODE,
    CLUSTER,
)
ADDRESS = _declare(
    "--address", metavar="URL",
    help="the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265",
)  # fmt: skip


def _make_stage_command(name: str, text: str, examples: str) -> Command:
    """Return the command that runs the named stage, and the stages that it needs."""
    arguments, examples = (*EXPERIMENT, ACCEPT_CODE), examples + CONFIGURATIONS + GOES_ON
    return Command(name, do.run_experiment, text, examples, arguments, do.check_submitted_run)


COMMANDS = (
    _make_stage_command("run", "run all unfinished stages: shard, train, sample, evaluate, figures, report", """\
  ddpm run                                            the digits, in minutes on two cores
  ddpm run cifar10 data.path=FOLDER                   the paper's CIFAR-10 experiment
  ddpm run digits cluster.workers=2 cluster.storage=/data/runs
"""),
    _make_stage_command("shard", "write the images as webdataset tars", """\
  ddpm shard cifar10 data.path=FOLDER                 from the files that data.source reads
"""),
    _make_stage_command("train", "train the network (DDP; continues from the newest checkpoint)", """\
  ddpm train digits train.steps=3000                  more steps, from where it ended
  ddpm train cifar10 cluster.workers=4 train.precision=bf16
"""),
    _make_stage_command("sample", "draw samples from the trained network", """\
  ddpm sample digits sample.num_images=1000           draws only the missing images, if there are some already
  ddpm sample digits sample.sampler=ddim sample.steps=50
  ddpm sample digits evaluate.checkpoints=all sample.checkpoint=best
"""),
    _make_stage_command("evaluate", "compute FID, IS and the NLL bound, each with its protocol", """\
  ddpm evaluate digits evaluate.metrics=[fid,is,kid]
  ddpm evaluate digits sample.weights=raw             scores of the raw weights of the same run
"""),
    _make_stage_command("figures", "draw the paper's figures", """\
  ddpm figures digits figures.which=[samples,progressive]
"""),
    _make_stage_command("report", "write report.html and report.md from the present results", """\
  ddpm report digits                                  the last stage of `ddpm run`
"""),
    Command("list", do.show_configurations, "list experiments, sweeps and clusters, each with a description", """\
  ddpm list                                           the names for `ddpm run`, `ddpm sweep` and --cluster
""", ()),
    Command("show", do.show_experiment, "show the resolved configuration and its keys; writes nothing", f"""\
  ddpm show cifar10                                   every key with its value
  ddpm show digits train.lr=1e-4                      also the name of its run directory
{CONFIGURATIONS}""", EXPERIMENT),
    Command("sweep", do.run_sweep, "run all trials of a sweep file, several at once; the same command continues", """\
  ddpm sweep digits_beta_dropout --dry-run            lists the trials, their resources, the time left
  ddpm sweep beta_dropout train.steps=20000           key=value is for all trials,
  ddpm sweep beta_dropout sweep.concurrent=4          sweep.key=value for the sweep

SWEEP is a path, or the name of a file in ./conf/sweep; conf/sweep/beta_dropout.yaml explains every key.
The same command again keeps finished trials, repeats failed ones, and runs points that were added to the file.
""", (_declare_names("SWEEP | key=value", "a sweep, and any number of overrides"), *STUDY), do.check_submitted_study),
    Command("reproduce", do.run_reproduction,
        "run the rows of the paper's Tables 1 and 2 as one study, at the paper's length or scaled to a budget", """\
  ddpm reproduce cifar10                              six rows of 800,000 steps, as in the paper
  ddpm reproduce cifar10 --budget 2h                  as many steps as this cluster makes in two hours (measured)
  ddpm reproduce cifar10 --budget 2000                2,000 steps each, with samples and scores in proportion

The same command again continues. A study that is shorter than the paper's says so in its first line.
""", (
        _declare("target", choices=("cifar10",), help="what to reproduce"),
        _declare_names("key=value", "overrides of every row, or cluster.key=value"),
        _declare("--budget", default="full", metavar="STEPS | TIME | full",
            help="steps of each row (2000), or a time for all rows together (2h, 30min); default: full"), *STUDY,
    ), do.check_submitted_study),
    Command("status", do.show_status, "show the runs, their state, progress and scores", """\
  ddpm status --watch cluster.storage=/data/runs      the runs of another storage root, until Ctrl-C
""", (_declare("--watch", action="store_true", help="show it again every few seconds"), *CLUSTER_ONLY)),
    Command("import", do.import_weights, "make a run of published weights in the diffusers layout", f"""\
  ddpm import FOLDER                                  google/ddpm-cifar10-32, for example
  ddpm import FOLDER --weights ema lsun_church
{CONFIGURATIONS}""", (
        _declare("path", metavar="PATH", help="their folder: config.json and the weights, or unet/"),
        _declare("--weights", choices=("raw", "ema", "unknown"), default="unknown", help="as published"),
        *EXPERIMENT,
    ), default="cifar10_published"),
    Command("export", do.export_weights, "write a run's weights for diffusers' DDPMPipeline.from_pretrained", """\
  ddpm export digits-3f2a DIR                         the newest EMA weights
  ddpm export models:/digits@champion DIR             weights that `ddpm register` has named
  ddpm export digits-3f2a DIR --weights raw --step 1000
""", (
        RUN, _declare("directory", metavar="DIR", help="the folder to write; it must not exist yet"),
        _declare("--weights", choices=("ema", "raw"), default="ema", help="default: ema"),
        _declare("--step", type=_parse_integer(0, 10**9), help="default: the newest checkpoint"), *CLUSTER_ONLY,
    )),
    Command("draw", do.draw_images, "draw images at once: a grid, an animation, an array or single pictures", """\
  ddpm draw digits-3f2a                               a grid of 16, samples.png
  ddpm draw digits-3f2a reverse.gif                   from noise to images
  ddpm draw DIR images.npz -n 1000 --seed 1           with weights from `ddpm export`; uint8 (N, H, W, C)
  ddpm draw digits-3f2a mixed.png --interpolate A.png B.png --at 500 --lambda 0.5
""", (
        _declare("run", metavar="RUN", help="a run, a folder of weights, or a models:/ address"),
        _declare_names("OUT | cluster.key=value",
            "OUT.png (default: samples.png), .gif or .npz, or a new folder for single pictures"),
        _declare("--out", metavar="OUT", help="the same"),
        _declare("-n", dest="number", type=_parse_integer(1, 10**6), help="images (16); with --interpolate rows (1)"),
        _declare("--seed", type=_parse_integer(0, 2**63 - 1), help="default: the run's, which draws its own samples"),
        _declare("--label", help="a class, cycle, none, or a vector: 0.5,0,0.5"),
        _declare("--steps", type=_parse_integer(1, 10**6), help="default: those of the run"),
        _declare("--interpolate", nargs=2, metavar=("A", "B"), help="two image files of the network's size"),
        _declare("--lambda", dest="weights", metavar="L", help="one or several; default: 0,0.1,...,1"),
        _declare("--at", type=_parse_integer(0, 10**6), help="t at which latents are mixed; default: T/2"), CLUSTER,
    )),
    Command("compare", do.compare_runs, "write a report over several runs", """\
  ddpm compare digits-3f2a digits-91bc
  ddpm compare cifar10 --metric nll                   all runs whose names begin with this, ranked by their bound
""", (
        _declare_names("RUN", "a run directory, or the start of the names of one or several"),
        _declare("--metric", default="fid", help="what they are ranked by: fid (default), is, nll, kid, ..."), CLUSTER,
    )),
    Command("sync", do.sync_run, "send a whole run to the tracking server, also a second time", """\
  ddpm sync digits-3f2a cluster.tracking_uri=http://HOST:5000
""", (RUN, *CLUSTER_ONLY)),
    Command("rm", do.remove_runs, "delete runs or their samples; asks first", """\
  ddpm rm digits-3f2a cifar10-77aa                    these runs
  ddpm rm --failed                                    all runs whose last command failed
  ddpm rm --samples                                   sample sets that no score uses, of all or the named runs
""", (
        _declare_names("RUN", "names of runs, in full or their start"), CLUSTER,
        _declare("--failed", action="store_true", help="only runs whose last command failed"),
        _declare("--samples", action="store_true", help="only sample sets"),
        _declare("--force", action="store_true", help="also files that a score or a leaderboard uses"),
        _declare("--yes", action="store_true", help="do not ask"),
    )),
    Command("register", do.register_model, "give a run's weights a name in MLflow's registry", """\
  ddpm register digits-3f2a --alias champion          mlflow.pyfunc.load_model("models:/digits@champion") draws
""", (
        RUN, _declare("--alias", help="a second name of this version of the model"),
        _declare("--name", help="of the model; default: the experiment's"), *CLUSTER_ONLY,
    )),
    Command("push", do.push_run, "copy finished shards, checkpoints, samples and scores to an object store", """\
  ddpm push digits-3f2a s3://BUCKET/runs
  ddpm push data/digits-77aa s3://BUCKET/runs         the shards alone
""", (
        _declare("run", metavar="RUN", help="a run, or data/NAME: shards alone"),
        _declare("uri", metavar="s3://BUCKET/PREFIX", help="where it goes in the store"), *CLUSTER_ONLY,
    )),
    Command("pull", do.pull_run, "copy a pushed run into the storage root", """\
  ddpm pull s3://BUCKET/runs/digits-3f2a
""", (_declare("uri", metavar="s3://BUCKET/PREFIX/RUN", help="the address of a pushed run"), *CLUSTER_ONLY)),
    Command("ui", do.serve_ui, "open the MLflow UI on this project's store", """\
  ddpm ui --port 5001 cluster.storage=/data/runs
""", (_declare("--port", type=_parse_integer(1, 65535), default=5000, help="default: 5000"), *CLUSTER_ONLY)),
    Command("submit", do.submit_job,
        "run a command as a Ray job on a cluster: ddpm submit [OPTIONS] -- run cifar10 --cluster CLUSTER", """\
  ddpm submit -- run cifar10 --cluster compose
  ddpm submit --follow --id first -- sweep digits_beta_dropout --cluster kuberay

  ddpm submit --cluster kuberay --queue team -- run cifar10 | kubectl create --filename -

Code and configurations are sent, data never. `ddpm jobs` shows the job. With --cluster kuberay nothing is sent: the
command prints a RayJob, a cluster for this command alone, with the code and the configurations of its image.
""", (
        _declare_names("-- COMMAND", "run, sweep, train, ..."),
        _declare("--follow", action="store_true", help="print the job's log, and end with its exit code"),
        _declare("--id", default="", metavar="NAME", help="default: the command and the time"), ADDRESS,
        _declare("--cluster", choices=("kuberay",), help="print a RayJob instead"),
        _declare("--queue", metavar="NAME", help="the RayJob's Kueue queue"),
        _declare("--priority", metavar="CLASS", help="the RayJob's priority class in Kueue"),
        _declare("--hours", type=_parse_integer(1, 10**4), help="time limit of the RayJob"),
        _declare("--template", default="deploy/kuberay/rayjob.yaml", metavar="FILE",
            help="the RayJob to fill in; default: %(default)s"),
    )),
    Command("jobs", do.run_job_command, "list a cluster's jobs; show the log or the status of one, or stop it", """\
  ddpm jobs
  ddpm jobs logs run-cifar10-20260131-235959 --follow
""", (
        _declare("action", nargs="?", choices=("list", "logs", "status", "stop"), default="list", help="default: list"),
        _declare("job_id", nargs="?", metavar="ID", help="of one job"),
        _declare("--follow", action="store_true", help="with logs: until the job ends, with its exit code"), ADDRESS,
    )),
    Command("doctor", do.show_diagnosis, "check this machine, with a remedy for everything that is missing", """\
  ddpm doctor cluster.tracking_uri=http://HOST:5000   also checks that server
  ddpm doctor --cluster compose                       on its head: also checks that all machines share the root
  ddpm doctor cifar10 train.precision=bf16            also prints the GPU memory of a training step
""", EXPERIMENT),
)  # fmt: skip


def build_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    text = "Denoising Diffusion Probabilistic Models, end to end."
    hint = f"{COMMANDS[0].examples}\n`ddpm COMMAND --help` has the options and examples of each."
    program = ArgumentParser(prog="ddpm", description=text, epilog=hint)
    program.add_argument("--version", action="store_true", help="print the version")
    parsers = program.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command in COMMANDS:
        text = command.text
        parser = parsers.add_parser(command.name, help=text, description=text, epilog=command.examples)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        for names, settings in command.arguments:
            parser.add_argument(*names, **settings)
    for parser in (program, *parsers.choices.values()):
        parser.formatter_class, parser.allow_abbrev = RawDescriptionHelpFormatter, False
    return program, parsers.choices


def parse_arguments(arguments: list[str]) -> Namespace:
    """Parse a command line, with options at any place. Exits with code 2 if it is wrong.

    The result has the Command as `command`; the words after `submit --` are `job`, and parsed they are `job_options`.
    """
    program, parsers = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        from pipeline.cli import completion

        completion.complete(program, parsers)
    if arguments == ["--version"]:
        from pipeline.engine.code import find_version

        print(f"ddpm {find_version()}")
        program.exit()
    if not arguments:
        program.print_help()
        program.exit()
    if arguments[0].startswith("-"):
        program.parse_args(arguments)
    name, *words = arguments
    if name not in parsers:
        program.error(f"no command is named '{name}'{suggest(name, parsers)}; `ddpm --help` has all names")
    cut = words.index("--") if name == "submit" and "--" in words else len(words)
    options, stray = parsers[name].parse_known_intermixed_args(words[:cut])
    if stray:
        known = parsers[name]._option_string_actions
        parsers[name].error(f"unknown option {stray[0]}{suggest(stray[0], known)}")
    options.command = next(command for command in COMMANDS if command.name == name)
    options.job = words[cut + 1 :]
    options.job_options = parse_arguments(options.job) if options.job else None
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if not {"*", "127.0.0.1"} & set(direct.split(",")):  # no proxy for servers on this machine
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"localhost,127.0.0.1,::1,{direct}".strip(",")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return options.command.run(options) or 0
    except KeyboardInterrupt:
        drop_lost_outputs()
        print("interrupted; the same command continues from the files on disk", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads the output any more
        return 1
    except (PipelineError, ModuleNotFoundError, OSError) as error:
        text = _explain_error(error)
        if options.debug or text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _explain_error(error: Exception) -> str | None:
    """Return the text of a user's error, with its remedy; None for a bug."""
    if isinstance(error, ModuleNotFoundError):
        remedy = f"{sys.executable} has no module {error.name}: install this program for it (pip install .)"
        return None if str(error.name).startswith(("pipeline", "ddpm")) else remedy
    if isinstance(error, OSError):  # a full disk, a folder that cannot be written
        thing = "the current folder" if isinstance(error, FileNotFoundError) else "the output, or a file"
        return f"{error.filename or thing}: {error.strerror or error}"
    return str(error)

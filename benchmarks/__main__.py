"""The command: runs the benchmarks that were named, writes JSON, prints the table last."""

import argparse
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.harness import Outcome, Settings, as_json, machine, table

NAMES = ("unet", "sampling", "data", "evaluate", "scale", "memory")
ROUNDS, QUICK_ROUNDS = 5, 3
GPU_MINUTES = 7.0  # after which no contender is taken on; the last one may be compiling for a minute


def main(arguments: list[str] | None = None) -> dict[str, Outcome]:
    """Run and print; returns what was found."""
    asked = _parser().parse_args(arguments)
    # What deterministic steps need, as the cluster's workers have it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    rounds = asked.rounds or (QUICK_ROUNDS if asked.quick else ROUNDS)
    device, cpu_clock = torch.device(asked.device), asked.clock == "cpu"
    minutes = asked.minutes or (GPU_MINUTES if device.type == "cuda" else float("inf"))
    deadline = time.monotonic() + 60 * minutes
    settings = Settings(device, asked.quick, rounds, asked.data, cpu_clock, deadline)
    facts = machine(settings)
    outcomes: dict[str, Outcome] = {}
    for name in asked.names or NAMES:
        began = time.monotonic()
        outcomes[name] = _run(name, settings)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        facts["load_average_after"] = [round(x, 1) for x in os.getloadavg()]
        asked.json.write_text(json.dumps(as_json(outcomes, facts), indent=1, default=str))
    _print(outcomes, facts, asked)
    return outcomes


def _run(name: str, settings: Settings) -> Outcome:
    """One benchmark; a library that is missing, or a fault, leaves it out and not the others."""
    try:
        return import_module(f"benchmarks.{name}").run(settings)
    except ImportError as error:
        return Outcome(skipped=[f"{error.name} is not installed"])
    except Exception as error:
        return Outcome(skipped=[f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"])


def _print(outcomes: dict[str, Outcome], facts: dict, asked: argparse.Namespace) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    print(
        f"\n{facts.get('gpu', facts['cpu'])}, {facts['threads']} threads on {facts['cores']} cores, load average "
        f"{facts['load_average'][0]} before and {facts['load_average_after'][0]} after; {versions}"
    )
    what = "rates by CPU time" if asked.clock == "cpu" else "rates by the wall clock"
    print(f"{what}, medians of turns; spread = interquartile range over median; all of it in {asked.json}\n")
    print(table(outcomes), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and smaller cases: a look, no result"
    )
    parser.add_argument("--rounds", type=int, help=f"measured turns of each contender, default {ROUNDS}")
    parser.add_argument("--threads", type=int, help="of torch, default its own choice")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, with --threads 1"
    )
    parser.add_argument(
        "--minutes", type=float, help=f"no new contender after so many; default on GPUs {GPU_MINUTES:g}"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, help="CIFAR-10, as data.path takes it; default: images of noise")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="where the results go")
    return parser


if __name__ == "__main__":
    main()

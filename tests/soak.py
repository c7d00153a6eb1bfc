"""One experiment killed with -9 again and again, beside its untouched twin: `make soak`.

Each kill waits for its phase to be under way, and falls on the driver, a training worker, the Train controller or a
task, at a random moment; those of the phase `checkpoint` while one is being written. Some only ask it to stop: SIGHUP
to the driver, SIGTERM to its whole process group; then nothing may be left running. In the end both runs must have the
same training state, images, scores and figures, byte for byte, and in MLflow one finished run with equal curves, each
point once.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
from mlflow import MlflowClient

from pipeline.store.files import hash_file

STEPS = 1000
EXPERIMENT = [
    "train.checkpoint_every=50", "train.log_every=10", "train.sample_every=500", "train.keep=2",
    "model.channels=16", "model.dropout=0.1", "diffusion.timesteps=250", "sample.num_images=320", "sample.steps=null",
    "sample.batch_size=16", "evaluate.nll_images=120", "evaluate.nll_batch_size=4",
    "evaluate.nll_timesteps=null", "figures.which=[samples,rate_distortion]",
]  # fmt: skip
CLUSTER = ["cluster.workers=2", "cluster.cpus_per_worker=1", "cluster.retries=20"]

# Whom the kills of each phase hit; the order is drawn.
TRAINING = {
    "training": ["driver", "hangup", "group", "controller", "worker", "worker"],
    "checkpoint": ["driver", "group", "controller", "worker", "worker"],
}
UNITS = {
    "sampling": ["driver", "hangup", "group", "task", "task"],
    "evaluation": ["driver", "hangup", "group", "task", "task"],
}
ASKED = {"hangup": (os.kill, signal.SIGHUP), "group": (os.killpg, signal.SIGTERM)}
PROCESSES = {"worker": "ray::RayTrainWorker", "controller": "ray::TrainController", "task": "ray::Actor.run"}
# How far the run comes between two kills, at most: points of the curve, or units.
APART = {"training": 6, "checkpoint": 6, "sampling": 2, "evaluation": 4}
DELAY = 0.5  # seconds at most, from there to the kill
PATIENCE = 300  # seconds without a moment for the next kill


class Run:
    """The run in a storage root, and the command that works on it, which is given again whenever it has ended."""

    def __init__(self, storage: Path, experiment: list[str] = EXPERIMENT, steps: int = STEPS):
        self.storage, self.steps = storage, steps
        self.words = [
            "digits", *experiment, "name=soak", f"train.steps={steps}", *CLUSTER, f"cluster.storage={storage}",
        ]  # fmt: skip
        self.last_kill = 0.0
        storage.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "pipeline", "run", *self.words]
        with (self.storage / "output.log").open("ab") as log:
            self.command = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup ignores it
            )  # fmt: skip

    def finish(self) -> None:
        """Wait for the end; what was killed is given again. Exits where the command fails by itself."""
        if self.command.wait() != 0:
            self.start()
        if self.command.wait() != 0:
            sys.exit(f"the command fails; its words are in {self.storage}/output.log")

    @property
    def path(self) -> Path:
        return next((file.parent for file in self.storage.glob("soak-*/experiment.yaml")), self.storage)

    # Where it is, told from files and processes

    def pieces(self, phase: str) -> int:
        """Points of the curve, or units, that are on file."""
        if phase in TRAINING:
            log = self.path / "log.jsonl"
            return log.read_bytes().count(b"\n") if log.exists() else 0
        units = {"sampling": "samples/*/*.tar", "evaluation": "evaluation/units/nll-*/*.npz"}
        return len(list(self.path.glob(units[phase])))

    def is_over(self, phase: str) -> bool:
        """Return whether the phase is over, so that nothing can be killed in it."""
        seal = {"sampling": "samples/*/manifest.json", "evaluation": "evaluation/*/metrics.json"}
        return any(self.path.glob(seal.get(phase, f"train/step_{self.steps:08d}")))

    def is_writing_a_checkpoint(self) -> bool:
        with suppress(FileNotFoundError):
            return any(path.stat().st_mtime > self.last_kill for path in self.path.glob("train/.tmp-step_*"))
        return False

    def progress(self) -> str:
        if self.is_over("training"):
            return f"{self.pieces('sampling')} tars, {self.pieces('evaluation')} units of the bound"
        torn = ", one torn" * any(self.path.glob("train/.tmp-step_*"))
        return f"step {(self.path / '.step').read_text()}{torn}"

    def processes(self, kind: str) -> list[int]:
        if kind == "driver" or kind in ASKED:
            return [self.command.pid]
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.command.pid).children(recursive=True)
            return [one.pid for one in family if PROCESSES[kind] in " ".join(one.cmdline())]
        return []

    # Kills

    def kill(self, phase: str, kind: str, draw: random.Random) -> str | None:
        """Kill one process in the phase, when the run has come further than at the last kill.

        Returns how far; None where the phase ended.
        """
        enough = self.pieces(phase) + draw.randint(1, APART[phase])
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not self.is_over(phase):
            if self.command.poll() is not None:
                self.start()
            if self.pieces(phase) >= enough and self._has_killed(phase, kind, draw):
                return self.progress()
            time.sleep(0.05)
        return None

    def _has_killed(self, phase: str, kind: str, draw: random.Random) -> bool:
        time.sleep(draw.uniform(0, DELAY))
        victims = self.processes(kind)  # looked up before the moment, which is short
        while phase == "checkpoint" and not self.is_writing_a_checkpoint():
            if self.command.poll() is not None or self.is_over(phase):
                return False
            time.sleep(0.0005)
        if not victims or self.is_over(phase):
            return False
        family = psutil.Process(self.command.pid).children(recursive=True) if kind in ASKED else []
        with suppress(ProcessLookupError):
            send, number = ASKED.get(kind, (os.kill, signal.SIGKILL))
            send(draw.choice(victims), number)
            self.last_kill = time.time()
            if kind in ASKED and (code := self.command.wait(PATIENCE)) != 130:
                sys.exit(f"{kind}: exit code {code}; see {self.storage}/output.log")
            if left := psutil.wait_procs(family, timeout=10)[1]:
                sys.exit(f"{kind}: still running: {left}")
            return True
        return False


def soak(run: Run, draw: random.Random) -> list[tuple[str, str]]:
    """Bring the run to its end through all kills; returns (phase, victim) of each."""
    began, fell = time.monotonic(), []
    for phases in (TRAINING, *({phase: kinds} for phase, kinds in UNITS.items())):
        plan = [(phase, kind) for phase, kinds in phases.items() for kind in kinds]
        draw.shuffle(plan)
        for phase, kind in plan:
            if where := run.kill(phase, kind, draw):
                fell.append((phase, kind))
                print(f"{time.monotonic() - began:>5.0f} s  {phase:<10}  {kind:<10}  {where}", flush=True)
    run.finish()
    return fell


def files_of(run: Run) -> dict[str, str]:
    """sha256 of whatever the run made that has a number or a pixel in it."""
    patterns = (
        f"train/step_{run.steps:08d}/*.safetensors", "samples/*/*.tar", "evaluation/*/[!.]*.json", "grids/*.png",
        "figures/*/*.png", "figures/*/*.svg",
    )  # fmt: skip
    paths = sorted(path for pattern in patterns for path in run.path.glob(pattern))
    return {str(path.relative_to(run.path)): hash_file(path) for path in paths}


def curves_of(run: Run) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric in MLflow but the speed. Exits unless there is one run, and finished."""
    client = MlflowClient(f"sqlite:///{run.storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'soak'")
    found = client.search_runs([experiment.experiment_id])
    if [one.info.status for one in found] != ["FINISHED"]:
        sys.exit(f"MLflow has {[one.info.status for one in found]} instead of one finished run")
    histories = {key: client.get_metric_history(found[0].info.run_id, key) for key in found[0].data.metrics}
    histories.pop("train/images_per_second", None)
    return {key: sorted((point.step, point.value) for point in points) for key, points in histories.items()}


def differences(soaked: Run, twin: Run) -> list[str]:
    found = []
    for what, read in (("file", files_of), ("curve", curves_of)):
        ours, theirs = read(soaked), read(twin)
        found += [f"{what} {n}" for n in sorted(ours | theirs) if ours.get(n) != theirs.get(n)]
        found += [f"no {what} to compare"] * (not theirs)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, help="where both runs are kept (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="of moments, victims and their order")
    options = parser.parse_args()
    storage = options.storage or Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"both runs are in {storage}; first the one that nothing happens to", flush=True)
    twin = Run(storage / "twin")
    twin.finish()
    soaked = Run(storage / "soaked")
    fell = soak(soaked, random.Random(options.seed))
    phases = Counter(phase for phase, _ in fell)
    found = differences(soaked, twin)
    found += [f"only {phases[phase]} kills in {phase}" for phase in TRAINING | UNITS if phases[phase] < 3]
    found += [f"only {len(fell)} kills"] * (len(fell) < 20)
    compared = {"files": len(files_of(twin)), "points": sum(map(len, curves_of(twin).values()))}
    print(json.dumps({"kills": len(fell), **phases, "compared": compared, "differences": found}, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

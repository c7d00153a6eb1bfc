"""deploy/slurm/ddpm.sbatch in a real Slurm: a controller and two nodes on hosts of their own."""

import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
from compose_file import OURS, ROOT
from conftest import TINY, read_losses, wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
MISSING = [name for name in PROGRAMS if not shutil.which(name)]
HOW = f"no {MISSING}: apt-get install slurmctld slurmd munge"
pytestmark = [*hosts.MARKS, pytest.mark.skipif(bool(MISSING), reason=HOW)]
NODES = ("node1", "node2")
MUNGED = (
    "munged --foreground --force --key-file=/srv/slurm/munge.key --socket=/srv/slurm/munge.socket"
    " --pid-file=/tmp/munged.pid --seed-file=/tmp/munged.seed"
)
# Requeued work waits for `cred_expire`, so that nothing of the first attempt can still be accepted.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=control
AuthInfo=socket=/srv/slurm/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation=/srv/slurm/state
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
SlurmdSpoolDir=/tmp/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName=node[1-2] CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""
ENDED = ("COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED")
LONG = [*TINY, "train.steps=600", "train.checkpoint_every=50", "train.log_every=10"]


class Slurm:
    def __init__(self, folder: Path):
        self.volumes = folder / "volumes"
        (self.volumes / "slurm" / "state").mkdir(parents=True)
        (self.volumes / "slurm" / "slurm.conf").write_text(SLURM_CONF)
        # The first version's plugin needs no control groups as long as nothing asks for them.
        (self.volumes / "slurm" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.volumes / "slurm" / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        names = ("munge", "control", *NODES)
        self.network = hosts.Network(folder / "hosts", {name: name for name in names})

    def up(self) -> None:
        self.start("munge", MUNGED)
        wait_until((self.volumes / "slurm" / "munge.socket").exists, 30)
        self.start("control", "slurmctld -D")
        for node in NODES:
            self.start(node, f"slurmd -D -N {node}")
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T %D") == "idle 2", 60)

    def start(self, host: str, command: str) -> None:
        """Start a command on a host that knows itself by its name."""
        named = ["unshare", "--uts", "sh", "-ec", f"hostname {host} && exec {command}"]
        service = {
            "image": OURS, "command": named, "volumes": ["slurm:/srv/slurm", "runs:/srv/runs"], "shm_size": "1g",
            "environment": {"SLURM_CONF": "/srv/slurm/slurm.conf", "DDPM_STORAGE": "/srv/runs"},
        }  # fmt: skip
        self.network[host].start(service, self.volumes)

    def ask(self, *command: str) -> str:
        told = self.network["control"].execute(*command)
        return (told.stdout + told.stderr).strip()

    def state(self, job: str) -> tuple[str, str]:
        """Return the state of a job, and how often it was put back into the queue."""
        told = self.ask("scontrol", "show", "job", job)
        return re.findall(r"JobState=(\w+)", told)[0], re.findall(r"Restarts=(\d+)", told)[0]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.up()
        yield slurm
    finally:
        slurm.network.close()


def test_a_job_trains_on_both_nodes_and_goes_on_from_its_checkpoint_after_the_time_limit(slurm):
    words = ["--chdir", str(ROOT), "--output=/srv/slurm/job.log", "--nodes=2", "--cpus-per-task=1"]
    script = str(ROOT / "deploy" / "slurm" / "ddpm.sbatch")
    job = slurm.ask("sbatch", "--parsable", *words, script, "train", "digits", *LONG, "cluster.workers=2")
    log = slurm.volumes / "slurm" / "job.log"
    steps = lambda: list((slurm.volumes / "runs").glob("tiny-*/train/step_*/meta.json"))  # noqa: E731
    wait_until(lambda: bool(steps()) or slurm.state(job)[0] in ENDED, 300)
    assert steps(), log.read_text()
    assert "600/600" not in log.read_text(), "the run was over before it was asked to stop"
    slurm.ask("scancel", "--batch", "--signal=TERM", job)  # what --signal=B:TERM@300 sends
    wait_until(lambda: slurm.state(job)[1] == "1", 120)
    wait_until(lambda: slurm.state(job)[0] in ENDED, 400)
    print(log.read_text())
    assert slurm.state(job) == ("COMPLETED", "1"), log.read_text()
    (run,) = (slurm.volumes / "runs").glob("tiny-*")
    assert [step for step, _ in read_losses(run)] == list(range(10, 601, 10))
    for node in NODES:
        logs = (slurm.network[node].folder / "tmp").glob(f"ray-{job}/session_2*/logs/worker-*.err")
        assert any("TrainWorker" in log.read_text(errors="replace") for log in logs), node

"""Two users of one group share a storage root: a setgid folder, each with the umask 002."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
from compose_file import ROOT
from conftest import ONE_CPU, TINY

pytestmark = hosts.MARKS

GROUP, USERS = 60000, {"ann": 60001, "bob": 60002}
# Lets others reach an interpreter in somebody's home, in a mount namespace of its own.
OPEN_HOME = (
    'mount --bind "$1" /mnt; mount -t tmpfs -o mode=755 tmpfs "/$2"; mkdir -p "$1"; mount --bind /mnt "$1"'
)


@pytest.fixture
def root() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ddpm-", dir="/tmp"))  # pytest's own are closed to others
    os.chown(folder, 0, GROUP)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def run_as(user: str, root: Path, *words: str) -> str:
    """Run a command of ddpm as a user; return its output."""
    base = Path(sys.base_prefix).resolve()
    script = f'umask 002; shift 2; exec setpriv --reuid={USERS[user]} --regid={GROUP} --clear-groups "$@"'
    if not Path("/", base.parts[1]).stat().st_mode & 1:
        script = f"{OPEN_HOME}; {script}"
    command = ["unshare", "--mount", "sh", "-ec", script, "-", str(base), base.parts[1]]
    command += [sys.executable, "-m", "pipeline", *words, f"cluster.storage={root}"]
    home = f"/tmp/{user}-has-no-home"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "USER": user, "HOME": home}
    how = {"env": environment, "cwd": "/tmp", "timeout": 300}
    told = subprocess.run(command, capture_output=True, text=True, **how)
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


def test_each_of_two_users_continues_what_the_other_began(root):
    run = ["run", "digits", *TINY, "figures.which=[samples]", *ONE_CPU]
    run_as("ann", root, *run)
    (tiny,) = root.glob("tiny-*")
    run_as("bob", root, "draw", tiny.name, str(root / "bob.png"))
    run_as("bob", root, *run, "train.steps=12")
    assert (tiny / "train" / "step_00000012").stat().st_uid == USERS["bob"]
    paths = [path for path in root.rglob("*") if not path.is_symlink()]
    closed = [path for path in paths if path.stat().st_gid != GROUP or path.stat().st_mode & 0o060 != 0o060]
    assert not closed, "the colleague is shut out"
    run_as("ann", root, "rm", tiny.name, "--force", "--yes")
    assert not tiny.exists()

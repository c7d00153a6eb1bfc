"""Deployment files: the image, the Kubernetes manifests, the Slurm script; each read by a program made for it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from compose_file import OURS, ROOT, services
from compose_file import tree as read_compose
from test_compose import ENV, long_options

from pipeline.cli.program import main

BIN = Path(sys.executable).parent
SCRIPT = ROOT / "deploy" / "slurm" / "ddpm.sbatch"
KUBERAY = ROOT / "deploy" / "kuberay"
OBJECTS = [tree for file in sorted(KUBERAY.glob("*.yaml")) for tree in yaml.safe_load_all(file.read_text())]
PLAIN = [tree for tree in OBJECTS if not tree["apiVersion"].startswith("ray.io/")]

# ray.io/v1 as https://ray-project.github.io/kuberay/reference/api/ has it: the keys that we use.
CLUSTER_KEYS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
JOB_KEYS = {
    "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec",
    "runtimeEnvYAML", "activeDeadlineSeconds",
}  # fmt: skip
SCHEMAS = ROOT.parent / "shared" / "data" / "kuberay"
RAYJOB = f"submit --cluster kuberay --queue team --hours 48 --template {KUBERAY}/rayjob.yaml".split()


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (tree for tree in OBJECTS if tree["kind"] == kind)
    return found


CLUSTERS = [of_kind("RayCluster")["spec"], of_kind("RayJob")["spec"]["rayClusterSpec"]]
GROUPS = [group for spec in CLUSTERS for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
OWNERS = [*GROUPS, *(tree["spec"] for tree in PLAIN if "template" in tree.get("spec", {}))]
TEMPLATES = [owner["template"] for owner in OWNERS]


@pytest.mark.parametrize(("linter", "file"), [("hadolint", ROOT / "Dockerfile"), ("shellcheck", SCRIPT)])
def test_the_linters_have_nothing_to_say(linter, file):
    outcome = subprocess.run([BIN / linter, file], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout


def test_the_image_runs_as_a_user_and_gets_what_the_project_declares(tmp_path):
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER 1000:1000$", text, re.M)
    (line,) = re.findall(r'python -c "(.*?)" > requirements.txt', text.replace("\\\n", ""), re.S)
    command = [sys.executable, "-c", line]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {re.split("[<>=~]", line)[0] for line in told}
    assert {"torch", "psycopg[binary]", "boto3"} <= names
    assert not {"pytest", "ruff"} & names


@pytest.mark.parametrize("given", ["0" * 40 + "+", ""], ids=["given", "not given"])
def test_the_image_knows_its_commit_where_it_was_given(given, tmp_path):
    """The step of the Dockerfile, in a folder of what it copies; git would know better here, and is not there."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    (step,) = re.findall(r"^RUN (if .*?) && pip install --no-deps", lines, re.M)
    for package in ("ddpm", "pipeline"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    known = f"{sys.executable} -c 'from pipeline.engine import code; print(code.find_commit())'"
    environment = {"COMMIT": given, "PATH": "", "PYTHONPATH": str(tmp_path)}
    command = ["/bin/sh", "-c", f"{step}\n{known}"]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.stdout.strip() == (given or "None"), told.stderr


def test_what_the_image_copies_reaches_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    admitted = {name[1:] for name in ignored if name[0] == "!"}
    assert admitted == {name for line in copied for name in line.split()} and "*" in ignored


def test_manifests_and_pods_of_ray_keep_to_the_schema():
    head = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    pods = [{**head, "spec": template["spec"]} for template in TEMPLATES]
    assert len(pods) == 6
    for tree in [*PLAIN, *pods]:
        kubernetes_validate.validate(tree, kubernetes_validate.latest_version(), strict=True)


def test_ray_resources_have_the_keys_of_the_operator():
    assert of_kind("RayJob")["spec"].keys() <= JOB_KEYS
    for spec in CLUSTERS:
        assert spec.keys() - {"enableInTreeAutoscaling"} == CLUSTER_KEYS
        assert spec["rayVersion"] == metadata.version("ray")
        assert spec["authOptions"] == {"mode": "token"}
    for group in GROUPS:
        assert group.keys() <= GROUP_KEYS
        options = {f"--{name}" for name in group["rayStartParams"]}
        assert options <= long_options(("ray.scripts.scripts", "start"))
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert of_kind("RayCluster")["spec"]["enableInTreeAutoscaling"] is True  # replicas alone scale nothing
    assert of_kind("RayJob")["spec"]["backoffLimit"] == 0 and "generateName" in of_kind("RayJob")["metadata"]
    cluster, of_job = (json.dumps(spec["workerGroupSpecs"][0]["template"]) for spec in CLUSTERS)
    assert cluster == of_job and '"nvidia.com/gpu": "8"' in of_job, "a pod has a whole machine"
    assert all(str(tree).count("'fsGroup'") == str(tree).count("OnRootMismatch") for tree in OBJECTS)
    (rule,) = of_kind("NetworkPolicy")["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app": "mlflow"}}}]


def find_unknown_keys(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """The keys that the operator would drop without a word."""
    if isinstance(value, list):
        return [found for item in value for found in find_unknown_keys(item, schema.get("items", {}), path)]
    known = schema.get("properties")
    if not isinstance(value, dict) or known is None:
        return []
    unknown = [f"{path}.{key}" for key in value.keys() - known.keys()]
    both = value.keys() & known.keys()
    below = [find_unknown_keys(value[key], known[key], f"{path}.{key}") for key in both]
    return sum(below, unknown)


def read_schema(kind: str) -> dict[str, Any]:
    """The operator's schema; without it, the keys above stand in for it."""
    if not SCHEMAS.exists():
        return {"properties": {"spec": {}}}
    with (SCHEMAS / f"ray.io_{kind}.yaml").open() as file:
        version = yaml.load(file, yaml.CSafeLoader)["spec"]["versions"][0]
    assert version["name"] == "v1"
    return version["schema"]["openAPIV3Schema"]


def test_commands_become_rayjobs_that_the_operator_takes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = [of_kind("RayJob")]
    for words, nodes in (
        (["run", "digits"], 1),
        (["sweep", "digits_beta_dropout", "cluster.workers=9"], 2),
        (["train", "digits", "cluster.workers=16"], 2),
        (["train", "digits", "cluster.workers=16", "cluster.cpus_per_worker=24"], 4),
    ):
        assert main([*RAYJOB, "--", *words]) == 0
        jobs.append(job := json.loads(capsys.readouterr().out))
        group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        assert job["spec"]["entrypoint"] == shlex.join(["ddpm", *words, "--cluster", "kuberay"])
        assert job["spec"].keys() <= JOB_KEYS and job["spec"]["activeDeadlineSeconds"] == 48 * 3600
        assert {group["replicas"], group["minReplicas"], group["maxReplicas"]} == {nodes}
        assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert main([*RAYJOB, "--", "run", "digits", "cluster.cpus_per_task=97"]) == 1
    assert "1 task with 97 CPUs" in capsys.readouterr().err, "no pod is that large"
    for kind, trees in (("rayjobs", jobs), ("rayclusters", [of_kind("RayCluster")])):
        schema = read_schema(kind)
        for tree in trees:
            assert not list(jsonschema.Draft4Validator(schema).iter_errors(tree))
            assert not find_unknown_keys(tree["spec"], schema["properties"]["spec"])


def test_claims_and_services_that_are_named_are_there():
    claims = {tree["metadata"]["name"] for tree in PLAIN if tree["kind"] == "PersistentVolumeClaim"}
    volumes = [volume for template in TEMPLATES for volume in template["spec"]["volumes"]]
    used = [volume["persistentVolumeClaim"] for volume in volumes if "persistentVolumeClaim" in volume]
    assert {claim["claimName"] for claim in used} == claims
    settings = yaml.safe_load((ROOT / "conf/cluster/kuberay.yaml").read_text())
    names = {tree["metadata"]["name"] for tree in PLAIN if tree["kind"] == "Service"}
    assert re.match(r"http://(\w+):5000", settings["tracking_uri"])[1] in names
    for group in GROUPS:
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "runs", "mountPath": settings["storage"]} in container["volumeMounts"]


def test_both_deployments_start_the_same_images_and_tracking_server():
    compose = services(ENV)
    containers = [box for template in TEMPLATES for box in template["spec"]["containers"]]
    assert {box["image"] for box in containers} == {OURS, compose["postgres"]["image"]}
    (server,) = (box for box in containers if box["name"] == "mlflow")
    assert server["command"] == compose["mlflow"]["entrypoint"]


def merge(base: Any, patch: Any) -> Any:
    """A strategic merge, as `kubectl patch` makes it: lists of what has a name are merged by the name."""
    if isinstance(patch, dict):
        return base | {key: merge(base[key], value) if key in base else value for key, value in patch.items()}
    if not isinstance(patch, list) or not isinstance(patch[0], dict):
        return patch
    named = {item["name"]: item for item in base}
    new = {item["name"]: merge(named.get(item["name"], {}), item) for item in patch}
    return list((named | new).values())


def test_mlflow_with_passwords_is_that_of_compose():
    files = (KUBERAY / "auth" / name for name in ("mlflow.patch.yaml", "config.yaml"))
    patch, config = (yaml.safe_load(file.read_text()) for file in files)
    (plain,) = (tree for tree in PLAIN if tree["kind"] == "Deployment")
    deployment, compose = merge(plain, patch), services(ENV)["mlflow-auth"]
    for manifest in (deployment, config):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    assert [server["command"], server["args"]] == [compose["entrypoint"], compose["command"]]
    wanted = {name for name in compose["environment"] if not name.startswith("AWS") and "S3" not in name}
    assert {variable["name"] for variable in server["env"]} == wanted
    assert config["data"]["mlflow-auth.ini"] == read_compose()["configs"]["mlflow-auth"]["content"]
    assert {mount["name"] for mount in server["volumeMounts"]} == {"auth", "mlartifacts"}
    drivers = [spec["workerGroupSpecs"][0] for spec in CLUSTERS] + [CLUSTERS[1]["headGroupSpec"]]
    for group in drivers:
        (container,) = group["template"]["spec"]["containers"]
        keys = {variable["name"]: variable["valueFrom"]["secretKeyRef"] for variable in container["env"]}
        wanted = {"name": "mlflow-auth", "key": "password", "optional": True}
        assert keys["MLFLOW_TRACKING_PASSWORD"] == wanted


def test_the_slurm_script_uses_options_that_the_installed_programs_know_and_says_how_it_is_used():
    starts = re.findall(r"ray start ((?:[^&\n]|\\\n)*)", SCRIPT.read_text())
    common = re.findall(r"common=\(([^)]*(?:\([^)]*\)[^)]*)*)\)", SCRIPT.read_text(), re.S)
    options = set(re.findall(r"--[a-z-]+", " ".join([*starts, *common])))
    assert len(options) >= 8 and options <= long_options(("ray.scripts.scripts", "start"))
    outcome = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert outcome.returncode == 2 and "usage: sbatch" in outcome.stderr


STUBS = {
    "hostname": 'case "$*" in --ip*) echo 127.0.1.1;; --all*) echo "10.0.0.5 fe80::1";; *) echo one;; esac',
    "srun": 'echo "$RAY_ADDRESS" >> started; case "$*" in *--exclude*) sleep 1; exit 1;; *) exec sleep 60;; esac',
    "python": '[ "$1" != - ] || exec sleep 60', "ray": "", "ddpm": "touch ran",
}  # fmt: skip


def test_a_slurm_job_ends_when_the_ray_of_one_node_does(tmp_path):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1"}
    command, environment = ["bash", SCRIPT, "run", "digits"], job | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    how = {"cwd": tmp_path, "env": environment, "timeout": 30}
    outcome = subprocess.run(command, capture_output=True, text=True, **how)
    assert outcome.returncode == 1 and "a node's Ray has ended" in outcome.stderr, outcome
    assert not (tmp_path / "ran").exists()
    assert {line[:9] for line in (tmp_path / "started").read_text().split()} == {"10.0.0.5:"}

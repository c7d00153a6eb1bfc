"""Experiment (whatever may change a number) and Cluster (where it runs; it must not change one).

Loading reports every fault at once, each in one line with a suggestion. Keys hash content, never place.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm.backbones import NETWORKS
from ddpm.diffusion import DiffusionConfig
from ddpm.training import TrainConfig
from pipeline.errors import ConfigError
from pipeline.rundir import sha256_of

Problems = list[tuple[str, str]]

METRICS = ("fid", "is", "nll")
FIGURES = ("samples", "progressive")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and what shape they have. `labels` is the number of classes, 0 for none;
    `test_images` are held out where the source has no test split of its own."""

    source: Literal["cifar10", "digits", "folder", "npy"]
    path: str | None
    image_size: int
    channels: int
    labels: int
    images_per_shard: int
    test_images: int
    resize: Literal["crop", "refuse"]
    max_undecodable: int

    def problems(self) -> Problems:
        found = _at_least(self, image_size=2, labels=0, images_per_shard=1, test_images=0, max_undecodable=0)
        if self.channels not in (1, 3):
            found.append(("channels", f"is {self.channels}; images are grey (1) or colour (3)"))
        if self.source in ("folder", "npy") and self.path is None:
            found.append(("path", f"is null; data.source={self.source} needs the place of the images"))
        return found


@dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn. `steps` null = all T; `variance` null = diffusion.variance; `checkpoint` is
    `last` (step train.steps) or a step. A work unit is `batch_size` images."""

    num_images: int
    sampler: Literal["ancestral", "ddim"]
    steps: int | None
    eta: float
    variance: Literal["fixedlarge", "fixedsmall"] | None
    batch_size: int
    weights: Literal["ema", "raw"]
    checkpoint: str

    def problems(self) -> Problems:
        found = _at_least(self, num_images=1, batch_size=1)
        if self.steps is not None:
            found += _at_least(self, steps=1)
        if not 0 <= self.eta <= 1:
            found.append(("eta", f"is {self.eta}; it lies in [0, 1]: 0 is deterministic, 1 ancestral"))
        if self.checkpoint != "last" and not self.checkpoint.isdigit():
            found.append(("checkpoint", f"is '{self.checkpoint}'; use last or a step number"))
        return found


@dataclass(frozen=True)
class EvaluateConfig:
    """Which scores, and their protocol. `nll_images` null = the whole test split."""

    metrics: tuple[str, ...]
    features: Literal["inception-v3-compat", "classifier", "projection"]
    extractor_weights: str | None
    reference: Literal["train", "test"]
    nll_images: int | None
    nll_batch_size: int
    decoder: Literal["tanh", "erf"]
    variance: Literal["fixedlarge", "fixedsmall"] | None

    def problems(self) -> Problems:
        found = _at_least(self, nll_batch_size=1) + _among(self, "metrics", METRICS)
        if self.nll_images is not None:
            found += _at_least(self, nll_images=1)
        if self.extractor_weights and not Path(self.extractor_weights).is_file():
            found.append(("extractor_weights", f"'{self.extractor_weights}' is not a file; see `ddpm doctor`"))
        return found


@dataclass(frozen=True)
class FiguresConfig:
    """Which figures of the paper are drawn."""

    which: tuple[str, ...]

    def problems(self) -> Problems:
        return _among(self, "which", FIGURES)


@dataclass(frozen=True)
class Experiment:
    """Everything that may change a number."""

    name: str
    seed: int
    data: DataConfig
    diffusion: DiffusionConfig
    model: Any
    train: TrainConfig
    sample: SampleConfig
    evaluate: EvaluateConfig
    figures: FiguresConfig

    def problems(self) -> Problems:
        """Faults that only several sections together show, each with its full key."""
        found: Problems = []
        if not 0 <= self.seed < 2**63:
            found.append(("seed", f"is {self.seed}; it lies in [0, 2^63)"))
        found += [(f"model.{key}", fault) for key, fault in self.model.problems(self.data.image_size)]
        if (self.sample.steps or 0) > self.diffusion.timesteps:
            found.append(
                ("sample.steps", f"is {self.sample.steps}, more than diffusion.timesteps={self.diffusion.timesteps}")
            )
        if checkpoint_step(self) > self.train.steps:
            found.append(("sample.checkpoint", f"is {self.sample.checkpoint}, beyond train.steps={self.train.steps}"))
        if self.evaluate.features == "classifier" and not self.data.labels:
            found.append(("evaluate.features", "is classifier, which needs labels; use projection for unlabelled images"))
        return found


@dataclass(frozen=True)
class ClusterConfig:
    """Where it runs. Null means chosen from what the cluster has; `workers` 0 = this process, without Ray."""

    workers: int | None
    cpus_per_worker: int | None
    gpus_per_worker: float | None
    cpus_per_task: int
    gpus_per_task: float | None
    retries: int
    ray_address: str | None
    storage: str
    tracking_uri: str | None

    def problems(self) -> Problems:
        found = _at_least(self, cpus_per_task=1, retries=0)
        for key, least in (("workers", 0), ("cpus_per_worker", 1), ("gpus_per_worker", 0), ("gpus_per_task", 0)):
            if getattr(self, key) is not None:
                found += _at_least(self, **{key: least})
        return found


def _at_least(section: Any, **least: float) -> Problems:
    return [
        (key, f"is {getattr(section, key)}; it must be at least {bound}")
        for key, bound in least.items()
        if getattr(section, key) < bound
    ]


def _among(section: Any, key: str, known: tuple[str, ...]) -> Problems:
    return [
        (key, f"has '{value}', which is unknown{suggestion(value, known)}; known: {', '.join(known)}")
        for value in getattr(section, key)
        if value not in known
    ]


def suggestion(word: str, known: typing.Iterable[str]) -> str:
    """' (did you mean x?)', or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


# Finding and reading files


def conf_folders() -> list[Path]:
    """Where names are looked up: ./conf, then the conf/ that came with the program."""
    package = Path(__file__).parent
    return [Path.cwd() / "conf", package / "conf", package.parent / "conf"]


def find(name: str, kind: Literal["", "cluster", "sweep"] = "") -> Path:
    """The file that `name` (a path, or a name in conf/) means."""
    if Path(name).suffix in (".yaml", ".yml"):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"{name} does not exist; give the path of a yaml file, or a name in conf/{kind}")
    folders = [folder / kind for folder in conf_folders()]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise ConfigError(
        f"no {kind or 'experiment'} is named '{name}'{suggestion(name, known)}; known: {', '.join(known)}"
    )


def _read(path: Path, seen: tuple[Path, ...] = ()) -> Any:
    """The tree of a yaml file laid over its `base:`."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to the file itself")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # PyYAML's errors share no narrow base with OmegaConf's
        raise ConfigError(f"{path} is not valid yaml: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"{path} holds no keys")
    tree.pop("made_with", None)  # a run directory's experiment.yaml can be run again
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = path.parent / f"{base}.yaml"
    parent = _read(beside if beside.is_file() else find(base), (*seen, path.resolve()))
    parent.pop("name", None)  # a name belongs to the file that says it
    return OmegaConf.merge(parent, tree)


def _with_overrides(tree: Any, overrides: list[str]) -> Any:
    bad = [item for item in overrides if "=" not in item or item.startswith("=")]
    if bad:
        raise ConfigError([f"'{item}' is no override; write key=value" for item in bad])
    try:
        return OmegaConf.merge(tree, OmegaConf.from_dotlist(overrides))
    except Exception as error:
        raise ConfigError(f"an override cannot be applied: {' '.join(str(error).split())}") from error


# From trees to dataclasses, collecting every fault


def _section(cls: type, values: Any, where: str, faults: list[str]) -> Any:
    """An instance of the dataclass `cls` from a mapping, or None with what is wrong added to `faults`."""
    types = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        faults.append(f"{where} is {values!r}; it is a section with the keys {', '.join(types)}")
        return None
    before = len(faults)
    faults += [f"{where}.{key} is unknown{suggestion(str(key), types)}" for key in values if key not in types]
    faults += [f"{where}.{name} is missing" for name in types if name not in values]
    typed = OmegaConf.structured(cls)
    for name in types.keys() & values.keys():
        try:
            typed = OmegaConf.merge(typed, {name: _as_tuple(values[name], types[name])})
        except OmegaConfBaseException:
            faults.append(f"{where}.{name} is {values[name]!r}; {_expected(types[name])} is expected")
    return OmegaConf.to_object(typed) if len(faults) == before else None


def _as_tuple(value: Any, expected: Any) -> Any:
    """One value stands for a list of one."""
    return [value] if typing.get_origin(expected) is tuple and not isinstance(value, list) else value


def _expected(kind: Any) -> str:
    """A type in a user's words."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {_expected(typing.get_args(kind)[0])}"
    options = typing.get_args(kind)
    if options:
        return " or ".join("null" if option is type(None) else _expected(option) for option in options)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))


def _sections(tree: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """The sections of an experiment, each an instance, or None where it has faults."""
    types = typing.get_type_hints(Experiment)
    model = tree.get("model")
    name = model.get("name", "unet") if isinstance(model, dict) else "unet"
    if name in NETWORKS:
        types["model"] = NETWORKS[name][0]
    else:
        faults.append(f"model.name is '{name}'{suggestion(str(name), NETWORKS)}; known: {', '.join(NETWORKS)}")
        del types["model"]
    known = [*types, *(f"{s}.{k}" for s, cls in types.items() if dataclasses.is_dataclass(cls) for k in typing.get_type_hints(cls))]
    for key in tree.keys() - typing.get_type_hints(Experiment).keys():
        inner = [full for full in known if full.endswith(f".{key}")]
        faults.append(f"{key} is unknown{suggestion(inner[0] if inner else str(key), known)}")
    faults += [f"{key} is missing" for key in types if key not in tree]
    return {
        key: _section(cls, tree[key], key, faults)
        for key, cls in types.items()
        if key in tree and dataclasses.is_dataclass(cls)
    }


def load_experiment(name: str, overrides: list[str]) -> Experiment:
    """Read, override, check. Raises ConfigError holding every fault, one line each."""
    path = find(name)
    loaded = _with_overrides(_read(path), overrides)
    tree = OmegaConf.to_container(loaded, resolve=True)
    tree.setdefault("name", path.stem)
    faults: list[str] = []
    sections = _sections(tree, faults)
    if not isinstance(tree.get("seed"), int):
        faults.append(f"seed is {tree.get('seed')!r}; a whole number is expected")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(tree["name"])):
        faults.append(f"name is {tree['name']!r}; it names a folder: letters, digits, '.', '_' and '-' only")
    for key, section in sections.items():
        if section is not None and key != "model":
            faults += [f"{key}.{inner} {message}" for inner, message in section.problems()]
    if faults:
        raise ConfigError(faults)
    sections["data"] = _absolute(sections["data"], "path")
    sections["evaluate"] = _absolute(sections["evaluate"], "extractor_weights")
    experiment = Experiment(name=str(tree["name"]), seed=tree["seed"], **sections)
    faults = [f"{key} {message}" for key, message in experiment.problems()]
    if faults:
        raise ConfigError(faults)
    return experiment


def _absolute(section: Any, key: str) -> Any:
    """The section with a path that means the same in every process: workers have other working folders."""
    path = getattr(section, key)
    return dataclasses.replace(section, **{key: str(Path(path).expanduser().absolute())}) if path else section


def load_cluster(name: str, overrides: list[str]) -> ClusterConfig:
    """The same for conf/cluster/; `overrides` without their `cluster.`."""
    tree = OmegaConf.to_container(_with_overrides(_read(find(name, "cluster")), overrides), resolve=True)
    faults: list[str] = []
    cluster = _section(ClusterConfig, tree, "cluster", faults)
    if cluster is not None:
        faults = [f"cluster.{key} {message}" for key, message in cluster.problems()]
    if faults:
        raise ConfigError(faults)
    return cluster


def to_dict(section: Any) -> dict[str, Any]:
    """A dataclass as plain containers, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(section)))


def to_yaml(section: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(section)))


# Keys

# What may change without making another run: how far it goes, and what is kept or shown on the way.
_NOT_IN_RUN_KEY = {"checkpoint_every", "sample_every", "log_every", "keep"}


def hash_of(content: Any) -> str:
    """12 hex digits of the sha256 over canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def data_key(experiment: Experiment, fingerprint: str) -> str:
    data = experiment.data
    return hash_of([fingerprint, data.image_size, data.channels, data.labels, data.test_images])


def run_content(experiment: Experiment) -> dict[str, Any]:
    """What the run key hashes beside the data: also the parameters that a tracking server is told."""
    dropped = _NOT_IN_RUN_KEY if experiment.train.lr_decay != "none" else _NOT_IN_RUN_KEY | {"steps"}
    tree = to_dict(experiment)
    train = {key: value for key, value in tree["train"].items() if key not in dropped}
    return {"seed": tree["seed"], "diffusion": tree["diffusion"], "model": tree["model"], "train": train}


def run_key(experiment: Experiment, data_key: str) -> str:
    return hash_of([data_key, run_content(experiment)])


def checkpoint_step(experiment: Experiment) -> int:
    """The training step whose weights are sampled and scored."""
    which = experiment.sample.checkpoint
    return experiment.train.steps if which == "last" else int(which)


def sample_key(experiment: Experiment, run_key: str) -> str:
    """`num_images` is left out: asking for more images adds units."""
    sampler = to_dict(experiment.sample)
    del sampler["num_images"], sampler["checkpoint"]
    return hash_of([run_key, checkpoint_step(experiment), sampler])


def evaluate_key(experiment: Experiment, run_key: str) -> str:
    evaluate = to_dict(experiment.evaluate)
    weights = evaluate["extractor_weights"]
    evaluate["extractor_weights"] = sha256_of(Path(weights)) if weights else None
    return hash_of([sample_key(experiment, run_key), experiment.sample.num_images, evaluate])


def figures_key(experiment: Experiment, run_key: str) -> str:
    return hash_of([sample_key(experiment, run_key), experiment.sample.num_images, to_dict(experiment.figures)])

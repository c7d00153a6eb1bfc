"""docker-compose.yml as an engine reads it: merged, with the values of an env file in place."""

import re
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT

COMPOSE = ROOT / "docker-compose.yml"
OURS = "ddpm:0.1.0"
VARIABLE = re.compile(r"\$\{(\w+)(:\?[^}]*)?\}")


def tree() -> dict[str, Any]:
    """The file, anchors merged, variables as they stand."""
    return yaml.safe_load(COMPOSE.read_text())


def read_env(path: Path) -> dict[str, str]:
    lines = (line.partition("=") for line in path.read_text().splitlines() if re.match(r"\w", line))
    return {name: value for name, _, value in lines}


def services(env: dict[str, str]) -> dict[str, Any]:
    """The services with their variables replaced. Raises where one is missing or blank."""

    def value(match: re.Match[str]) -> str:
        if not env.get(match[1]):
            raise KeyError(f"{match[1]}: {match[2]}")
        return env[match[1]]

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: fill(inner) for key, inner in node.items()}
        if isinstance(node, list):
            return [fill(inner) for inner in node]
        return VARIABLE.sub(value, node) if isinstance(node, str) else node

    return fill(tree()["services"])


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def size(text: str) -> int:
    return int(text[:-1]) * {"m": 2**20, "g": 2**30}[text[-1]]

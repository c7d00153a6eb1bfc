"""What the README shows works as it stands there."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_library_snippet_trains_and_draws():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    torch.manual_seed(0)
    exec(snippet, names)
    assert torch.isfinite(names["loss"])
    assert names["images"].shape == (2, 3, 32, 32)
    assert names["images"].abs().max() <= 1


def test_the_commands_it_names_exist():
    from pipeline.cli.program import COMMANDS

    commands = {command.name for command in COMMANDS}
    named = set(re.findall(r"`?ddpm ([a-z]+)", README))
    assert named <= commands | {"end"}, named - commands

"""Compare the numbers of this tree with those of another revision: python tests/same_numbers.py REV [key=value ...].

Both run the digits experiment, and 200 steps of two workers without dropout, one after the other on this machine; final
weights, shards, sample tars and scores must be equal, bit for bit. Overrides (train.steps=60, say) make it shorter.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
TWO_WORKERS = ["train", "digits", "name=two", "model.dropout=0", "train.steps=200", "cluster.workers=2"]


def run(tree: Path, storage: Path, words: list[str]) -> None:
    """Run the program of a tree; what it prints is shown."""
    print(f"== {tree.name}: ddpm {' '.join(words)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pipeline", *words, f"cluster.storage={storage}"]
    subprocess.run(command, cwd=tree, env=environment, check=True)


def read_numbers(storage: Path) -> dict[tuple[str, str], bytes]:
    """Read all that must be equal, by its kind and its name: folders are named by keys, which may differ."""
    found = {("shards", file.name): file.read_bytes() for file in storage.glob("data/*/*.tar")}
    for name in ("digits", "two"):
        (place,) = storage.glob(f"{name}-*")
        for file in max(place.glob("train/step_*")).glob("*.safetensors"):
            tensors = {f"{name} {file.name} {key}": x.tobytes() for key, x in load_file(file).items()}
            found |= {("tensors", key): content for key, content in tensors.items()}
        found |= {("samples", file.name): file.read_bytes() for file in place.glob("samples/*/*.tar")}
        for file in place.glob("evaluation/*/metrics.json"):
            scores = json.loads(file.read_text())
            for part in ("scores", "reference_points"):
                found["scores", part] = json.dumps(scores.get(part)).encode()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", metavar="REV")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    numbers = []
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
        other = Path(folder) / "revision"
        subprocess.run(["git", "worktree", "add", "--detach", other, options.revision], cwd=ROOT, check=True)
        try:
            for tree, name in ((other, "theirs"), (ROOT, "ours")):
                for words in (["run", "digits"], TWO_WORKERS):
                    run(tree, Path(folder) / name, [*words, *options.overrides])
                numbers.append(read_numbers(Path(folder) / name))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
    theirs, ours = numbers
    differing = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    print(f"compared: {dict(Counter(kind for kind, _ in ours))}")
    for kind, name in differing:
        print(f"differs: {kind}, {name}: {(ours if kind == 'scores' else {}).get((kind, name), '')}")
    print("the same numbers" if not differing else f"{len(differing)} differences")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())

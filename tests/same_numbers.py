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


def find(storage: Path, pattern: str) -> list[Path]:
    return sorted(storage.glob(pattern))


def compare_weights(ours: Path, theirs: Path) -> list[str]:
    """Compare every tensor of the last checkpoint, state and EMA."""
    faults = []
    for name in ("state.safetensors", "ema.safetensors"):
        mine, other = (load_file(find(path, "train/step_*")[-1] / name) for path in (ours, theirs))
        apart = [key for key in mine.keys() & other.keys() if mine[key].tobytes() != other[key].tobytes()]
        if apart or mine.keys() != other.keys():
            apart += sorted(mine.keys() ^ other.keys())
            faults.append(f"{name}: {len(apart)} tensors differ, {apart[0]} among them")
        print(f"   {ours.name}: {name}, {len(mine)} tensors, {len(apart)} differ")
    return faults


def compare_files(ours: Path, theirs: Path, pattern: str) -> list[str]:
    """Compare the bytes of files, by their names: their folders are named by keys, which may differ."""
    mine, other = ({file.name: file.read_bytes() for file in find(path, pattern)} for path in (ours, theirs))
    if not mine or mine.keys() != other.keys():
        return [f"{pattern}: {sorted(mine)} here, {sorted(other)} there"]
    apart = [name for name in mine if mine[name] != other[name]]
    print(f"   {pattern}: {len(mine)} files, {len(apart)} differ")
    return [f"{pattern}: {', '.join(apart)} differ"] if apart else []


def compare_scores(ours: Path, theirs: Path) -> list[str]:
    """Compare the scores and the reference points, to the last digit."""
    found = []
    for path in (ours, theirs):
        (file,) = find(path, "evaluation/*/metrics.json")
        content = json.loads(file.read_text())
        found.append({"scores": content["scores"], "reference_points": content["reference_points"]})
    print(f"   scores: {json.dumps(found[0]['scores'])}")
    here, there = map(json.dumps, found)
    return [f"scores: {here} here, {there} there"] if here != there else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", metavar="REV")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
        other = Path(folder) / "revision"
        subprocess.run(["git", "worktree", "add", "--detach", other, options.revision], cwd=ROOT, check=True)
        try:
            storages = []
            for tree, name in ((other, "theirs"), (ROOT, "ours")):
                storages.append(Path(folder) / name)
                run(tree, storages[-1], ["run", "digits", *options.overrides])
                run(tree, storages[-1], [*TWO_WORKERS, *options.overrides])
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
        theirs, ours = storages
        faults = compare_files(ours, theirs, "data/*/*.tar")
        for name in ("digits", "two"):
            (mine,), (other_run,) = find(ours, f"{name}-*"), find(theirs, f"{name}-*")
            faults += compare_weights(mine, other_run)
        runs = find(ours, "digits-*")[0], find(theirs, "digits-*")[0]
        faults += compare_files(*runs, "samples/*/*.tar") + compare_scores(*runs)
    for fault in faults:
        print(f"differs: {fault}")
    print("the same numbers" if not faults else f"{len(faults)} differences")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""The table and the picture of the documents' networks at a quarter of their width: document-networks.json.

python docs/results/document_networks.py RUN ...

Prints the rows of the table in docs/networks.md. The picture has the first samples of each run, a row a run.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.drawing.grids import save_grid
from pipeline.engine.find import read_place
from pipeline.store import tars
from pipeline.store.checkpoint import create_network
from pipeline.store.files import read_json

HERE = Path(__file__).parent
PICTURE = HERE.parent / "pictures" / "document-networks.png"
SHOWN = 16  # samples of each run
SCORES = {"fid": 2, "is_mean": 2, "nll_bpd": 3}  # with their decimals


def main(runs: list[str]) -> None:
    found: list[dict[str, Any]] = []
    images = []
    for run in runs:
        place = read_place(Path(run).absolute())
        file = max(place.path.glob("evaluation/*/metrics.json"), key=lambda path: path.stat().st_mtime)
        parameters = sum(p.numel() for p in create_network(place.experiment, "meta").parameters())
        scores = read_json(file, dict[str, Any])
        found.append({"name": place.experiment.name, "parameters": parameters, **scores})
        images.append(torch.from_numpy(tars.load_images(place.samples, "samples", 0, SHOWN)[0]))
        cells = [
            f"{scores['scores'][key]:.{n}f} ± {scores['scores'][key + '_se']:.{n}f}"
            for key, n in SCORES.items()
        ]
        name = place.experiment.model.name
        print(f"| `{name}` | {parameters:,} | {' | '.join(cells)} |")
    (HERE / "document-networks.json").write_text(json.dumps(found, indent=1) + "\n")
    save_grid(torch.cat(images), SHOWN, PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])

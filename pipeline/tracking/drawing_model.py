"""The code of a logged model: MLflow runs it where the model is loaded, and carries `ddpm` along. Imports no pipeline.

model = mlflow.pyfunc.load_model("models:/digits@champion")
images = model.predict({"n": 16, "seed": 0})  # uint8 (N, H, W, C); `label` and `steps` if they are wanted
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class DrawingModel(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        from safetensors.torch import load_file

        from ddpm import build_model

        settings = json.loads(Path(context.artifacts["settings"]).read_text())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = build_model(settings, load_file(context.artifacts["weights"]), device)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Draw n images for each row of the table `model_input`, whose other columns are options of the sampler."""
        from ddpm import to_uint8

        parts = [self.model.sample(**row) for row in model_input.to_dict("records")]
        return to_uint8(torch.cat(parts)).permute(0, 2, 3, 1).cpu().numpy()


set_model(DrawingModel())

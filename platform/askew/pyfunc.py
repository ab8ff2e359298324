"""A model as MLflow's Python function: `mlflow.pyfunc.load_model("models:/askew@champion").predict(frame)`.

A frame with a column `query` becomes query vectors. MLflow calls `_load_pyfunc` by its name; nothing is unpickled,
and no training code is read.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from askew.models import Model, Vectors


class QueryEncoder:
    """What MLflow holds of a loaded model."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> Vectors:
        """Encode the column `query` of n rows to (n, dim), as the index is searched."""
        return self.model.queries([str(query) for query in frame["query"]])


def _load_pyfunc(path: str) -> QueryEncoder:
    return QueryEncoder(Model.load(Path(path)))

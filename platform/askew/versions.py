"""A version of a registered model, as those know it who never ask MLflow."""

from pathlib import Path

from askew.config import Settings
from askew.errors import ArtifactError

MODEL_KEY, INDEX = "askew.model_key", "askew.index"  # tags: what identifies its files, and its index's folder


class Version(Settings):
    """One version of a registered model."""

    name: str
    version: str
    run_id: str
    source: str
    tags: dict[str, str]
    description: str = ""

    @property
    def index(self) -> Path:
        """The folder of the index that was built by it. Raises ArtifactError when there is none."""
        if (folder := self.tags.get(INDEX)) is None:
            raise ArtifactError(f"an index of {self.name} version {self.version}", "none", "run the index stage")
        return Path(folder)

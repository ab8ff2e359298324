"""Promote: the alias that says which version is served moves to a version, as a person moves it in MLflow's page.

Endpoints that follow the alias check the version at their gates. `force` takes it past those of quality, which are
about how good it is, and never past those of what its files are.
"""

import getpass
import os
from typing import Any

from pydantic import Field

from askew.config import Settings
from askew.registry import CHAMPION, Registry
from askew.releases import BY, FORCE


class PromoteSettings(Settings):
    """Settings of the promote stage (`jobs/promote.yaml`)."""

    model: str
    version: str
    alias: str = CHAMPION
    force: bool = False
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))


def promote(settings: PromoteSettings) -> dict[str, Any]:
    """Set the alias on a version. Raises RegistryError when there is no such version."""
    registry = Registry(settings.tracking_uri)
    version = registry.resolve(settings.model, settings.version)
    registry.tag(version, {BY: getpass.getuser(), FORCE: "1" if settings.force else ""})
    registry.promote(version, settings.alias)
    return {
        "model": version.name,
        "version": version.version,
        "alias": settings.alias,
        "rows": 1,
        "skipped": False,
    }

"""What the tests share: a catalogue drawn small, and the triplets made of it, both real."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "RAY_AUTH_MODE": "disabled",  # the tests' clusters listen on loopback alone
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest

from askew import catalogue, triplets

TINY = 300


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster of this test run alone, ended with it."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def drawn_folder(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up catalogue of 300 items."""
    settings = catalogue.DrawSettings(root=tmp_path_factory.mktemp("catalogue"), num_items=TINY)
    return Path(catalogue.draw(settings)["artifact"])


@pytest.fixture(scope="session")
def triplets_folder(cluster: None, drawn_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triplets of that catalogue."""
    settings = triplets.PrepareSettings(data=drawn_folder, root=tmp_path_factory.mktemp("triplets"), image_size=32)
    return Path(triplets.prepare(settings)["artifact"])

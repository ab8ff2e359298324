"""Checkout: the folder with the scripts, settings and benches that a person runs."""

from pathlib import Path

from askew.errors import ConfigError

MARK = Path("jobs", "runtime_env.yaml")


def find(start: Path | None = None) -> Path:
    """Find the checkout that a folder, or this package, lies in. Raises ConfigError when neither does."""
    here = (start or Path.cwd()).absolute()
    for folder in (here, *here.parents, Path(__file__).parents[2]):
        if (folder / MARK).is_file() and (folder / "platform" / "askew").is_dir():
            return folder
    raise ConfigError("a checkout of askew, which has jobs/ and bench/", f"none at {here}", "run it in one")

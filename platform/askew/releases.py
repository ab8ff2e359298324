"""Releases: a model version and the index that it built, which are served as one or not at all."""

from pathlib import Path

from pydantic import ConfigDict, ValidationError

from askew import artifacts
from askew.config import Settings
from askew.errors import ArtifactError, ConfigError
from askew.messages import Release as Told
from askew.messages import Served
from askew.segments import Plan
from askew.versions import INDEX as INDEX
from askew.versions import MODEL_KEY, Version

# more of a version's tags: its index's release identity, and what is set by who promotes it
RELEASE, FORCE, BY = "askew.release", "askew.force", "askew.promoted_by"


class Release(Settings):
    """What replicas load to serve it."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    name: str
    version: str
    model: str  # the folder of the model artifact
    index: str  # the folder of the index artifact
    identity: str  # of all that a vector and a hit depend on
    model_key: str
    index_key: str
    sizes: tuple[int, ...]  # items of each shard, without what changed since the index was built
    schema_: bytes  # of the items, as Arrow writes it

    @property
    def key(self) -> str:
        """What tells it from any other: short, and readable in logs."""
        return f"{self.version}-{self.index_key[:12]}"

    @property
    def told(self) -> Told:
        """What the endpoint says of it."""
        return Told(
            model=Served(name=self.name, version=self.version), model_key=self.model_key,
            index_key=self.index_key, items=sum(self.sizes), shards=len(self.sizes),
        )  # fmt: skip

    def is_of(self, version: Version) -> bool:
        """Whether it is this version with the index that the version has now."""
        of = version.tags.get(MODEL_KEY), version.tags.get(INDEX)
        return (self.version, self.model_key, self.index) == (version.version, *of)

    @property
    def there(self) -> bool:
        """Whether its files are where they were."""
        return Path(self.model).is_dir() and Path(self.index).is_dir()


def find(version: Version, num_shards: int, model: Path) -> Release:
    """Find the release of a version whose files are in `model`.

    Raises ArtifactError when it has no index, or one that is not its own; ConfigError when there are fewer
    segments than shards.
    """
    folder = version.index
    manifest = artifacts.read(folder, "index", verify=False)
    if (made_by := manifest.inputs.get("model", "")) != (key := version.tags.get(MODEL_KEY, "")):
        raise ArtifactError(
            f"an index made by model {key[:12]}", f"one made by {made_by[:12]}", "run the index stage"
        )
    plan = Plan.read(folder, version.tags.get(RELEASE))
    if num_shards > len(plan.segments):
        raise ConfigError(
            f"at most {len(plan.segments)} shards, one a segment", str(num_shards), "lower num_shards"
        )
    return Release(
        name=version.name, version=version.version, model=str(model), index=str(folder), identity=plan.release,
        model_key=key, index_key=manifest.key, sizes=_sizes(plan, num_shards),
        schema_=plan.schema.serialize().to_pybytes(),
    )  # fmt: skip


def _sizes(plan: Plan, num_shards: int) -> tuple[int, ...]:
    of = {one["name"]: int(one["items"]) for one in plan.details["segments"]}
    return tuple(sum(of[name] for name in plan.share(number, num_shards)) for number in range(num_shards))


class Kept(Settings):
    """What a deployment of an endpoint serves, as it is kept on disk: the release, and the one before it."""

    deployed: str
    now: Release
    before: Release | None = None
    sum: str = ""  # of its own text, this being empty


def memory(cache: Path, uri: str, model: str, endpoint: str) -> Path:
    """Name the file in which an endpoint keeps what it serves."""
    return cache / f"served-{artifacts.key(endpoint, {'uri': uri, 'model': model}, {})[:12]}.json"


def remembered(path: Path, deployed: str | None = None) -> Kept | None:
    """Read what was served last, by that deployment or by any; None when nothing was, or it can't be read.

    One that can't be read is told, by its name.
    """
    try:
        content = path.read_bytes()
        kept = Kept.model_validate_json(content)
        artifacts.check_seal(path, content, kept.sum, "the alias says what is served")
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, ArtifactError) as error:
        found = " ".join(str(error).split())[:300]
        print(f"askew: warning: what was served last is not known from {path}: {found}", flush=True)
        return None
    return kept if deployed in (None, kept.deployed) else None


def remember(path: Path, now: Release, before: Release | None, deployed: str) -> None:
    """Write what is served, in the place of what was."""
    kept = Kept(deployed=deployed, now=now, before=before).model_dump_json(indent=1)
    artifacts.write_text(path, artifacts.sealed(kept))

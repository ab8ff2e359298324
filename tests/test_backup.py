"""A backup is taken while others write, and restored elsewhere it is the same release, search for search.

Two real MLflow servers, real models and indexes; what kills, kills by SIGKILL; the full disk is a real one.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests.conftest import mlflow_server
from typer.testing import CliRunner

from askew import artifacts, backup, live, releases, segments, snapshots
from askew.cli import app
from askew.errors import ArtifactError, ConfigError, RegistryError
from askew.inputs import Tokens
from askew.live import Follower, Live
from askew.models import Model
from askew.registry import Registry, Version
from askew.towers import TowerSettings, TwoTower

DIM = 8
TOWERS = {
    "dim": DIM, "text": {"width": 16, "layers": 1, "heads": 2}, "fusion": "text", "image_size": 16,
}  # fmt: skip
names = (f"backup-{number}" for number in range(1000))


class Shop(NamedTuple):
    """A root and a registered model with versions 1, 3 and 4, of which 3 is the champion; 2 was deleted."""

    root: Path
    uri: str
    name: str

    @property
    def registry(self) -> Registry:
        return Registry(self.uri)

    @property
    def index(self) -> Path:
        """The champion's index."""
        return self.registry.resolve(self.name, "champion").index


def register(root: Path, uri: str, name: str, seed: int) -> Version:
    """Register a model of its own weights, with a run that has all that runs have, and the index that it built."""
    settings = {"seed": seed, "of": name}
    with artifacts.draft(root, "model", settings, {}) as draft:
        torch.manual_seed(seed)
        tokens = Tokens.train(["red mug", "blue cap"], 60)
        Model(TwoTower(TowerSettings.model_validate(TOWERS), tokens.size), tokens).save(draft.folder)
        draft.details["dim"] = DIM
    model = artifacts.place(root, "model", artifacts.key("model", settings, {}))
    inputs = {"model": artifacts.read(model, "model").key, "triplets": "t"}
    with artifacts.draft(root, "index", {}, inputs) as draft:
        for number in range(2):
            items = pa.table({"item_id": [f"i{number}{n}" for n in range(4)]})
            vectors = np.random.default_rng(number).normal(size=(4, DIM)).astype(np.float32)
            segments.write(draft.folder / f"segment-{number}", vectors, items, None, f"r{seed}")
        segments.tell(draft, ["segment-0", "segment-1"])
    index = artifacts.place(root, "index", artifacts.key("index", {}, inputs))
    registry = Registry(uri)
    run = registry.start_run(name, f"seed {seed}", {"seed": seed, "text": "é 漢"}, {"askew.commit": "abc"})
    for step, value in enumerate((2.0, math.nan, math.inf, 0.5)):
        registry.log_metrics(run, {"loss": value, "valid/nDCG_at_10": value}, step)
    (root / "note.txt").write_text(f"seed {seed}\n")
    registry.log_files(run, root / "note.txt", "")
    registry.log_files(run, root / "note.txt", "evaluation/deep")
    (root / "note.txt").unlink()
    tags = {releases.INDEX: str(index), releases.RELEASE: f"r{seed}", "askew.force": ""}
    version = registry.register(name, model, run, tags)
    registry.end_run(run)
    return version


def shop(root: Path, uri: str) -> Shop:
    made = Shop(root, uri, next(names))
    _, two, three, four = (register(root, uri, made.name, seed) for seed in range(4))
    registry = made.registry
    registry._client.delete_model_version(made.name, two.version)
    registry._client.update_registered_model(made.name, "All that the shop sells")
    registry.describe(three, "Trained on autumn's clicks.\n\n**Ask Ada** – é")
    registry.promote(three)
    registry.promote(four, "challenger")
    event = registry.start_run(f"{made.name}-releases", "live: 3", {}, {"askew.event": "live"})
    registry.end_run(event)
    with Live(three.index) as writer:
        for number in range(12):
            upsert(writer, number)
            if number in (5, 9):
                writer.compact()
        writer.delete(["i00"])
    with artifacts.draft(root, "triplets", {"of": made.name}, {}) as draft:
        (draft.folder / "pairs").mkdir()
        (draft.folder / "pairs" / "part-0.parquet").write_bytes(random.Random(0).randbytes(3000))
    return made


def upsert(writer: Live, number: int) -> int:
    vector = np.random.default_rng(1000 + number).normal(size=(1, DIM)).astype(np.float32)
    return writer.upsert(vector, [{"item_id": f"new-{number}"}])


@pytest.fixture(scope="module")
def kept(two_mlflows: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Shop, Path]:
    """A shop with its backup, which no test changes."""
    made = shop(tmp_path_factory.mktemp("root"), two_mlflows[0])
    to = tmp_path_factory.mktemp("backups")
    backup.backup(made.root, made.uri, to, [made.name])
    return made, to


def hits(index: Path) -> tuple[int, list[Any], list[Any]]:
    """The last change to an index, and what queries find in it as it is now: ids and scores."""
    follower = Follower(index)
    found = follower.shard.search(np.random.default_rng(7).normal(size=(20, DIM)).astype(np.float32), 12)
    names = follower.shard.item_ids.take(pa.array(found.rows.ravel())).to_pylist()
    return follower.last, names, found.scores.tolist()


def told(uri: str, name: str) -> dict[str, Any]:
    """All that MLflow knows of a model, runs by their names, without what is another by nature."""
    registry = Registry(uri)
    [model] = [one for one in registry.models() if one.name == name]
    versions, runs = {}, {}
    of = [version.run_id for version in registry.versions(name)]
    for run_id in (*of, *registry.runs(f"{name}-releases", {})):
        run = registry.run(run_id)
        assert run is not None
        into = Path(tempfile.mkdtemp())
        registry._client.download_artifacts(run_id, "", str(into))
        tags = {key: value for key, value in run.tags.items() if not key.startswith("askew.resto")}
        assert run.name not in runs
        runs[run.name] = (
            str(run.metrics), run.params, tags, run.experiment, run.start, run.end, run.status, sums_of(into),
        )  # fmt: skip
        shutil.rmtree(into)
    for version in registry.versions(name):
        run = registry.run(version.run_id)
        assert run is not None
        assert version.source == run.model
        tags = {key: value for key, value in version.tags.items() if key != releases.INDEX}
        versions[version.version] = (tags, version.description, run.name, version.index.name)
    return {"model": model, "versions": versions, "runs": runs}


def sums_of(folder: Path) -> dict[str, str]:
    """The sums of a folder's files, hidden ones and the lock of a log left out."""
    found = snapshots.listed(folder)
    return {
        name: artifacts.sha256(path)
        for name, path in found.items()
        if not name.startswith(".") and not name.endswith("log/lock")
    }


# --- the same again ------------------------------------------------------------------------------


def answers(there: Shop, cache: Path) -> tuple[str, list[Any], list[Any]]:
    """What words find in the release that the alias is on, all of it read from MLflow and the root."""
    champion = there.registry.resolve(there.name, "champion")
    folder = there.registry.download(champion, cache)
    release = releases.find(champion, 2, folder)
    vectors = Model.load(folder).queries(["red mug", "blue cap", "a red cap"])
    shard = Follower(Path(release.index)).shard
    found = shard.search(vectors, 9)
    ids = shard.item_ids.take(pa.array(found.rows.ravel())).to_pylist()
    return champion.version, ids, found.scores.tolist()


def test_the_original_destroyed_search_answers_the_same_after_a_restore(
    two_mlflows: tuple[str, str], tmp_path: Path
) -> None:
    """MLflow killed and its store deleted, the root deleted; another MLflow, another root."""
    for name in ("root", "mlflow"):
        (tmp_path / name).mkdir()
    with mlflow_server(tmp_path / "mlflow") as uri:
        made = shop(tmp_path / "root", uri)
        before, release, found, sums = told(uri, made.name), made.index.name, hits(made.index), sums_of(made.root)
        answered = answers(made, tmp_path / "cache")
        done = backup.backup(made.root, uri, tmp_path / "backups")
    counts = {"artifacts": 9, "changes": 13, "versions": 3, "told": []}
    assert {key: done[key] for key in counts} == counts
    for name in ("root", "mlflow", "cache"):
        shutil.rmtree(tmp_path / name)

    again = backup.restore(tmp_path / "backups", tmp_path / "elsewhere", two_mlflows[1])
    assert (again["told"], again["put"]) == ([], 10)
    back = sums_of(tmp_path / "elsewhere")
    changed = {name for name in sums.keys() | back.keys() if sums.get(name) != back.get(name)}
    assert {name.partition(".live/")[2].partition("/")[0] for name in changed} <= {"log"}  # as one file
    assert told(two_mlflows[1], made.name) == before
    there = Shop(tmp_path / "elsewhere", two_mlflows[1], made.name)
    assert answers(there, tmp_path / "another-cache") == answered
    assert there.index == tmp_path / "elsewhere" / release
    assert hits(there.index) == found
    with Live(there.index) as writer:
        assert upsert(writer, 99) == 14
    assert hits(there.index)[0] == 14


def test_all_that_was_acknowledged_before_is_there_whoever_writes(
    kept: tuple[Shop, Path], two_mlflows: tuple[str, str], tmp_path: Path
) -> None:
    """Backups of an index that another thread changes and compacts without a pause."""
    made = Shop(tmp_path / "root", kept[0].uri, kept[0].name)
    shutil.copytree(kept[0].root, made.root)
    index, acknowledged, over = made.root / made.index.name, [0], threading.Event()

    def write() -> None:
        with Live(index) as writer:
            for number in range(100, 100_000):
                if over.is_set():
                    return
                acknowledged[0] = upsert(writer, number)
                if number % 7 == 0:
                    writer.compact()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        taken: list[tuple[int, Path, int]] = []
        for _ in range(3):
            before = acknowledged[0]
            where = Path(backup.backup(made.root, made.uri, tmp_path / "backups", [made.name])["backup"])
            taken.append((before, where, acknowledged[0]))
    finally:
        over.set()
        thread.join()
    assert taken[-1][2] > taken[0][0] + 20, "nothing was written meanwhile"
    for before, where, after in taken:
        snapshots.verify(where)
        copy = tmp_path / where.name
        shutil.copytree(where / backup.ARTIFACTS, copy)
        last = hits(copy / index.name)[0]
        assert before <= last <= after
        Live(copy / index.name).close()  # whole for a writer too
        changes = {f"new-{number}" for number in (*range(12), *range(100, 100 + last - 13))}
        own = {f"i{segment}{n}" for segment in range(2) for n in range(4)} - {"i00"}
        assert everything(copy / index.name) == own | changes


def everything(index: Path) -> set[str]:
    shard = Follower(index).shard
    found = shard.search(np.ones((1, DIM), np.float32), 100_000)
    return set(shard.item_ids.take(pa.array(found.rows[0])).to_pylist())


def test_what_did_not_change_takes_no_room_and_each_backup_is_whole_alone(
    kept: tuple[Shop, Path], tmp_path: Path
) -> None:
    made, _ = kept
    first, second = (backup.backup(made.root, made.uri, tmp_path, [made.name]) for _ in range(2))
    assert first["copied_bytes"] > 10 * second["copied_bytes"]
    sums = snapshots.sums(Path(second["backup"]))
    assert set(sums) == set(snapshots.sums(Path(first["backup"])))
    linked = {name for name in sums if (Path(second["backup"]) / name).stat().st_nlink > 1}
    assert set(sums) - linked == {backup.ABOUT}
    assert not any(path.stat().st_nlink > 1 for path in made.root.rglob("*") if path.is_file())
    shutil.rmtree(first["backup"])
    snapshots.verify(Path(second["backup"]))
    checked = ["sha256sum", "--check", "--quiet", "--strict", snapshots.SUMS]
    assert subprocess.run(checked, cwd=second["backup"], capture_output=True).returncode == 0


def test_a_file_of_mlflows_that_the_root_has_is_not_kept_twice(kept: tuple[Shop, Path]) -> None:
    made, to = kept
    folder = backup.located(to)
    key = artifacts.read(made.root / made.index.name, "index").inputs["model"]
    [weights] = [path for path in folder.glob(f"artifacts/model-{key[:12]}/weights.safetensors")]
    assert weights.stat().st_nlink == 2


# --- damage --------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_file_is_refused_by_its_name_before_anything_is_written(
    kept: tuple[Shop, Path], two_mlflows: tuple[str, str], tmp_path: Path
) -> None:
    folder, dice = tmp_path / "copy", random.Random(1)
    shutil.copytree(backup.located(kept[1]), folder)
    places = [*snapshots.listed(folder).values(), *[folder / snapshots.SUMS] * 30]
    for path in places:
        content = path.read_bytes()
        if not content:
            continue
        flipped = bytearray(content)
        flipped[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError) as refused:
            backup.restore(folder, tmp_path / "root", two_mlflows[1])
        if path.name != snapshots.SUMS:  # there the file is named whose line it is
            assert str(path) in str(refused.value)
        path.write_bytes(content)
    assert not (tmp_path / "root").exists()
    snapshots.verify(folder)
    (folder / "more").touch()
    with pytest.raises(ArtifactError, match=r"found .*/more; take another"):
        snapshots.verify(folder)


def test_damage_in_the_root_is_not_backed_up(kept: tuple[Shop, Path], tmp_path: Path) -> None:
    made = kept[0]
    root = tmp_path / "root"
    shutil.copytree(made.root, root)
    file = next(root.glob("triplets-*/pairs/*"))
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ArtifactError, match=rf"{file} as its manifest states it; found other content"):
        backup.backup(root, made.uri, tmp_path / "backups", [made.name])
    assert not list((tmp_path / "backups").glob("backup-*"))
    file.write_bytes(content)
    log = max(root.glob("*.live/log/*.wal"))
    whole = log.read_bytes()
    log.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(ArtifactError, match="damage at byte 0"):
        backup.backup(root, made.uri, tmp_path / "backups", [made.name])
    log.write_bytes(whole)
    backup.backup(root, made.uri, tmp_path / "backups", [made.name])


# --- refused -------------------------------------------------------------------------------------


def test_what_differs_is_never_overwritten(
    kept: tuple[Shop, Path], two_mlflows: tuple[str, str], tmp_path: Path
) -> None:
    made, to = kept
    copy = tmp_path / "root"
    shutil.copytree(made.root, copy)
    before = told(made.uri, made.name), made.index
    again = backup.restore(to, copy, made.uri)  # all is there, in root and MLflow
    assert again["put"] == 0
    lefts = [f"the index of {made.name} version {number} is still at " for number in (1, 3, 4)]
    assert [line[: len(left)] for line, left in zip(again["told"], lefts, strict=True)] == lefts
    assert (told(made.uri, made.name), made.index) == before  # what may be served is not moved away
    with Live(copy / made.index.name) as writer:
        upsert(writer, 50)
    with pytest.raises(ArtifactError, match=r"\.live as in the backup, or none; found another log of changes"):
        backup.restore(to, copy, made.uri)
    shutil.rmtree(live.place(copy / made.index.name))
    (file := next(copy.glob("triplets-*/pairs/*"))).write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"triplets-.* as in the backup, or none; found another pairs/part-0"):
        backup.restore(to, copy, made.uri)
    assert not live.place(copy / made.index.name).exists()
    assert file.read_bytes() == b"other"


def test_another_version_under_the_same_number_is_refused(two_mlflows: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    made = shop(tmp_path / "root", two_mlflows[0])
    (tmp_path / "other").mkdir()
    backup.backup(made.root, made.uri, tmp_path / "backups", [made.name])
    register(tmp_path / "other", two_mlflows[1], made.name, 77)
    with pytest.raises(
        RegistryError, match=r"version 1 of model .* as in the backup; found another, of model key"
    ):
        backup.restore(tmp_path / "backups", tmp_path / "new", two_mlflows[1])
    assert list((tmp_path / "new").glob("[!.]*")) == []
    registry = Registry(two_mlflows[1])
    registry.remove_version(made.name, "1")  # MLflow does not forget that there was one
    with pytest.raises(
        RegistryError, match=r"version 1 as the next of model .*; found version 2: it had more once"
    ):
        backup.restore(tmp_path / "backups", tmp_path / "new", two_mlflows[1])
    assert registry.versions(made.name) == []
    registry._client.delete_registered_model(made.name)
    backup.restore(tmp_path / "backups", tmp_path / "new", two_mlflows[1])
    assert told(two_mlflows[1], made.name)["versions"] == told(made.uri, made.name)["versions"]


def test_what_a_person_did_in_mlflow_since_stays(two_mlflows: tuple[str, str], tmp_path: Path) -> None:
    """The root was lost, MLflow was not."""
    (tmp_path / "root").mkdir()
    made = shop(tmp_path / "root", two_mlflows[0])
    backup.backup(made.root, made.uri, tmp_path / "backups", [made.name])
    registry = made.registry
    one, three, four = registry.versions(made.name)
    registry.promote(four)
    registry.describe(three, "Not so good")
    registry.tag(one, {releases.INDEX: str(made.root / "index-newer")})
    shutil.rmtree(made.root)
    done = backup.restore(tmp_path / "backups", tmp_path / "files", "", "artifacts")
    assert sums_of(tmp_path / "files") == sums_of(backup.located(tmp_path / "backups") / backup.ARTIFACTS)
    assert made.index.parent == made.root
    done = backup.restore(tmp_path / "backups", tmp_path / "new", made.uri)
    assert done["told"] == [f"alias 'champion' of {made.name} is on version 4, and was on 3: left there"]
    one, three, four = registry.versions(made.name)
    assert three.description == "Not so good"
    assert [version.index.parent.name for version in (one, three, four)] == ["root", "new", "new"]


def test_mlflow_alone_is_restored_beside_a_root_that_went_on(
    kept: tuple[Shop, Path], two_mlflows: tuple[str, str], tmp_path: Path
) -> None:
    made, to = kept
    root = tmp_path / "root"
    shutil.copytree(made.root, root)
    with Live(root / made.index.name) as writer:
        last = upsert(writer, 60)
    before = sums_of(root)
    backup.restore(to, root, two_mlflows[1], "mlflow")
    assert sums_of(root) == before
    there = Shop(root, two_mlflows[1], made.name)
    assert hits(there.index)[0] == last
    with pytest.raises(ConfigError, match="artifacts or mlflow as the only part; found 'all'"):
        backup.restore(to, root, two_mlflows[1], "all")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / backup.ABOUT).write_text('{"format": 2, "askew": "9.9"}'),
         "wanted format 1 in .*backup.json; found format 2, written by askew 9.9; restore it with the version"),
        (lambda folder: (folder / snapshots.SUMS).unlink(), "wanted a backup in .*; found none; name the folder"),
        (lambda folder: (folder / backup.ABOUT).unlink(), "wanted what a backup says in .*backup.json"),
        (lambda folder: (folder / backup.ABOUT).write_text("{}"), "format None"),
    ],
)  # fmt: skip
def test_what_is_no_backup_is_refused(
    kept: tuple[Shop, Path], tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(backup.located(kept[1]), folder)
    change(folder)
    with pytest.raises(ArtifactError, match=said):
        backup.restore(folder, tmp_path / "root", kept[0].uri)


def test_a_backup_inside_the_root_or_of_no_root_is_refused(kept: tuple[Shop, Path], tmp_path: Path) -> None:
    made = kept[0]
    with pytest.raises(ConfigError, match="outside of"):
        backup.backup(made.root, made.uri, made.root / "backups")
    with pytest.raises(ConfigError, match="wanted a folder of artifacts"):
        backup.backup(tmp_path / "none", made.uri, tmp_path / "backups")
    with pytest.raises(RegistryError):
        backup.backup(made.root, "http://127.0.0.1:9", tmp_path / "backups")


def test_an_index_that_a_version_names_and_the_root_lacks_is_told(kept: tuple[Shop, Path], tmp_path: Path) -> None:
    made = kept[0]
    shutil.copytree(made.root, tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / made.index.name)
    done = backup.backup(tmp_path / "root", made.uri, tmp_path / "backups", [made.name])
    assert done["told"] == [f"the index of {made.name} version 3 is not in the root: {made.index}"]


# --- killed, and a full disk ---------------------------------------------------------------------


FORKING = """
import json, os, sys
from pathlib import Path
from askew import backup
print("ready", flush=True)
for line in sys.stdin:
    what, *words = json.loads(line)
    if (child := os.fork()) == 0:
        getattr(backup, what)(*(Path(word) if word[0][0] == "/" else word for word in words))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killer:
    """Does a backup or a restore in a process of its own, and kills it at some point."""

    def __init__(self, folder: Path) -> None:
        one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": folder}
        paths = os.pathsep.join(sys.path)
        environment = {**os.environ, **one, "PYTHONPATH": paths}
        self._forking = subprocess.Popen([sys.executable, "-c", FORKING], text=True, env=environment, **pipes)
        assert self._said() == "ready"

    def _said(self) -> str:
        assert self._forking.stdout is not None
        return self._forking.stdout.readline().strip()

    def do(self, *words: str | Path | list[str], kill_after_s: float | None = None) -> bool:
        """Tells whether it was killed before it was done."""
        assert self._forking.stdin is not None
        self._forking.stdin.write(json.dumps(words, default=str) + "\n")
        self._forking.stdin.flush()
        child = int(self._said())
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            with suppress(ProcessLookupError):  # it is done
                os.kill(child, signal.SIGKILL)
        code = int(self._said())
        assert code in (0, -signal.SIGKILL)
        return code != 0

    def close(self) -> None:
        self._forking.kill()
        self._forking.communicate()


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[Killer]:
    made = Killer(tmp_path)
    yield made
    made.close()


def test_killed_at_any_point_and_run_again_a_backup_is_the_same(
    kept: tuple[Shop, Path], killer: Killer, tmp_path: Path
) -> None:
    made, dice = kept[0], random.Random(2)
    to, kills, after_s = tmp_path / "backups", 0, 0.0
    started = time.monotonic()
    assert not killer.do("backup", made.root, made.uri, tmp_path / "calm", [made.name])
    step_s = (time.monotonic() - started) / 6
    words = ("backup", made.root, made.uri, to, [made.name])
    while killer.do(*words, kill_after_s=(after_s := after_s + dice.random() * step_s)):
        kills += 1
        assert snapshots.newest(to) is None  # nothing that looks like a backup before it is one
    assert kills > 3
    calm, found = (snapshots.verify(backup.located(folder)) for folder in (tmp_path / "calm", to))
    assert {name for name in calm.keys() | found.keys() if calm.get(name) != found.get(name)} == {backup.ABOUT}
    assert {path.name[:7] for path in to.iterdir()} == {"backup-", ".backup"}


def test_killed_at_any_point_and_run_again_a_restore_is_the_same(
    two_mlflows: tuple[str, str], killer: Killer, tmp_path: Path
) -> None:
    (tmp_path / "first").mkdir()
    made, dice = shop(tmp_path / "first", two_mlflows[0]), random.Random(3)
    to, uri = tmp_path / "backups", two_mlflows[1]
    started = time.monotonic()
    backup.backup(made.root, made.uri, to, [made.name])
    step_s = (time.monotonic() - started) / 6  # a restore takes longer
    kills, after_s, words = 0, 0.0, ("restore", to, tmp_path / "root", uri)
    while killer.do(*words, kill_after_s=(after_s := after_s + dice.random() * step_s)):
        kills += 1
        for folder in (tmp_path / "root").glob("[!.]*"):
            if folder.suffix != ".live":
                artifacts.read(folder, json.loads((folder / artifacts.MANIFEST).read_bytes())["kind"])
        assert [version.version for version in Registry(uri).versions(made.name)] in (
            [], ["1"], ["1", "2"], ["1", "2", "3"], ["1", "2", "3", "4"], ["1", "3", "4"],
        )  # fmt: skip
    assert kills > 3
    assert told(uri, made.name) == told(made.uri, made.name)
    calm = sums_of(backup.located(to) / backup.ARTIFACTS)
    assert sums_of(tmp_path / "root") == calm
    assert not list((tmp_path / "root").glob(".*.restore"))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a disk that is full can be made by root alone")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_leaves_nothing_half_and_with_room_it_goes_on(
    kept: tuple[Shop, Path], two_mlflows: tuple[str, str], small: Path, tmp_path: Path
) -> None:
    made, to = kept
    with pytest.raises(
        ArtifactError, match=r"wanted room on the disk of .*none left; free some, and run it again"
    ):
        backup.backup(made.root, made.uri, small / "backups", [made.name])
    assert not list((small / "backups").glob("backup-*"))
    subprocess.run(["mount", "-o", "remount,size=50m", small], check=True)
    backup.backup(made.root, made.uri, small / "backups", [made.name])
    snapshots.verify(backup.located(small / "backups"))
    shutil.rmtree(small / "backups")
    subprocess.run(["mount", "-o", "remount,size=60k", small], check=True)
    with pytest.raises(
        ArtifactError, match=r"wanted room on the disk of .*none left; free some, and run it again"
    ):
        backup.restore(to, small / "root", made.uri)
    half = sums_of(small / "root")
    whole = sums_of(backup.located(to) / backup.ARTIFACTS)
    assert half.items() < whole.items()
    folders = {name.partition("/")[0] for name in half}
    assert {name for name in whole if name.partition("/")[0] in folders} == half.keys()
    subprocess.run(["mount", "-o", "remount,size=50m", small], check=True)
    backup.restore(to, small / "root", made.uri)
    assert sums_of(small / "root") == whole


# --- the command ---------------------------------------------------------------------------------


def test_each_is_one_command(kept: tuple[Shop, Path], tmp_path: Path) -> None:
    made, to = kept[0], tmp_path / "backups"
    uri = ("--tracking-uri", made.uri)

    def run(*words: str | Path) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, [*map(str, words)])
        return done.exit_code, done.stdout, done.stderr

    command = [sys.executable, "-m", "askew.cli", "backup", made.root, to, *uri, "--model", made.name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    where = backup.located(to)
    assert done.stdout.startswith(f"{where}: 9 artifacts, 3 versions, ")
    assert run("verify", to) == (0, f"{where}: whole: {len(snapshots.sums(where))} files\n", "")
    code, out, warned = run("restore", to, tmp_path / "root", *uri)
    assert (code, out) == (0, f"{where}: 9 artifacts in {tmp_path}/root, 3 versions in MLflow\n")
    assert warned.count("askew: warning: the index of ") == 3
    code, out, _ = run("restore", to, tmp_path / "other", "--only", "artifacts", "--json")
    assert (code, json.loads(out)["put"]) == (0, 10)
    code, _, error = run("backup", made.root, to, *uri, "--model", "nobody")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"askew: error: wanted a model 'nobody' in {made.uri}; found none; ")

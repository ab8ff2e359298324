"""Registry against a real MLflow server, with sqlite and its artifacts in a temporary folder."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from askew import artifacts
from askew.errors import ArtifactError, RegistryError
from askew.registry import Registry


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def registry(mlflow_uri: str) -> Registry:
    return Registry(mlflow_uri)


def make(root: Path, text: str) -> Path:
    """A model artifact with a file in a subfolder."""
    with artifacts.draft(root, "model", {"text": text}, {}) as draft:
        (draft.folder / "tokenizer").mkdir()
        (draft.folder / "tokenizer" / "words.txt").write_text(text)
        (draft.folder / "weights.safetensors").write_bytes(b"\0" * 1000)
    return artifacts.place(root, "model", artifacts.key("model", {"text": text}, {}))


def test_a_run_holds_its_params_metrics_files_and_end(registry: Registry, mlflow_uri: str, tmp_path: Path) -> None:
    run_id = registry.start_run("search", "first", {"lr": 0.1, "towers": ["a", "b"]}, {"askew.stage": "train"})
    registry.log_metrics(run_id, {"loss": 2.0}, step=1)
    registry.log_metrics(run_id, {"loss": 1.5, "eval/fused/nDCG_at_10": 0.25}, step=2)
    (tmp_path / "notes.txt").write_text("hello")
    registry.log_files(run_id, tmp_path / "notes.txt", "notes")
    registry.end_run(run_id)
    api = f"{mlflow_uri}/api/2.0/mlflow"
    run = httpx.get(f"{api}/runs/get", params={"run_id": run_id}).json()["run"]
    assert run["info"]["run_name"] == "first"
    assert run["info"]["status"] == "FINISHED"
    assert {p["key"]: p["value"] for p in run["data"]["params"]} == {"lr": "0.1", "towers": "['a', 'b']"}
    assert {m["key"]: m["value"] for m in run["data"]["metrics"]} == {"loss": 1.5, "eval/fused/nDCG_at_10": 0.25}
    files = httpx.get(f"{api}/artifacts/list", params={"run_id": run_id, "path": "notes"}).json()["files"]
    assert [f["path"] for f in files] == ["notes/notes.txt"]
    failed = registry.start_run("search", "second", {}, {})
    registry.end_run(failed, ok=False)
    status = httpx.get(f"{api}/runs/get", params={"run_id": failed}).json()["run"]["info"]["status"]
    assert status == "FAILED"


def test_a_watched_machine_s_doings_are_logged(registry: Registry) -> None:
    run_id = registry.start_run("search", "watched", {}, {})
    with registry.watching(run_id, "node-3"):
        time.sleep(2.5)
    found = registry.history(run_id, "system/node-3/system_memory_usage_percentage")
    assert found
    assert all(0 < value <= 100 for _, value in found)


def test_a_registered_model_comes_back_whole(registry: Registry, tmp_path: Path) -> None:
    folder = make(tmp_path / "here", "one")
    version = registry.register("shop", folder, registry.start_run("search", "r", {}, {}), {"colour": "red"})
    assert version.version == "1"
    assert version.source == f"runs:/{version.run_id}/model"
    assert version.tags == {"colour": "red", "askew.model_key": artifacts.read(folder, "model").key}
    there = registry.download(registry.resolve("shop", "1"), tmp_path / "there")
    assert there == tmp_path / "there" / folder.name
    assert artifacts.read(there, "model") == artifacts.read(folder, "model")
    assert (there / "tokenizer" / "words.txt").read_text() == "one"
    assert [p.name for p in (tmp_path / "there").iterdir()] == [folder.name], "nothing else is left behind"


def test_find_gives_the_newest_version_with_the_tags(registry: Registry, tmp_path: Path) -> None:
    run_id = registry.start_run("search", "r", {}, {})
    folder = make(tmp_path, "one")
    for colour in ("red", "blue", "red"):
        registry.register("tagged", folder, run_id, {"colour": colour})
    assert registry.find("tagged", {"colour": "green"}) is None
    assert registry.find("absent", {}) is None
    red, blue = (registry.find("tagged", {"colour": c}) for c in ("red", "blue"))
    assert red is not None
    assert blue is not None
    assert (red.version, blue.version) == ("3", "2")
    registry.tag(blue, {"askew.index": "/somewhere"})
    found = registry.find("tagged", {"colour": "blue", "askew.index": "/somewhere"})
    assert found is not None
    assert found.version == "2"


def test_an_alias_moves_and_what_is_absent_is_answered_with_what_is_there(
    registry: Registry, tmp_path: Path
) -> None:
    run_id = registry.start_run("search", "r", {}, {})
    first, second = (registry.register("moved", make(tmp_path, t), run_id, {}) for t in ("one", "two"))
    with pytest.raises(RegistryError, match=r"'champion' of model 'moved'; found versions 1, 2; aliases none"):
        registry.resolve("moved", "champion")
    registry.promote(second)
    assert registry.resolve("moved", "champion").version == "2"
    registry.promote(first)
    assert registry.resolve("moved", "champion") == registry.resolve("moved", "1")
    with pytest.raises(RegistryError, match=r"aliases champion \(version 1\)"):
        registry.resolve("moved", "7")
    with pytest.raises(RegistryError, match=r"found models .*moved"):
        registry.resolve("unheard-of", "champion")
    with pytest.raises(RegistryError, match="name of letters"):
        registry.resolve("x' or name != 'x", "1")


def test_a_kept_download_is_reused_and_a_damaged_one_replaced(registry: Registry, tmp_path: Path) -> None:
    run_id = registry.start_run("search", "r", {}, {})
    version = registry.register("kept", make(tmp_path / "here", "one"), run_id, {})
    folder = registry.download(version, tmp_path / "there")
    made = folder.stat().st_ino
    assert registry.download(version, tmp_path / "there").stat().st_ino == made
    (folder / "weights.safetensors").write_bytes(b"\1" * 1000)
    again = registry.download(version, tmp_path / "there")
    assert again == folder
    assert again.stat().st_ino != made
    assert artifacts.read(again, "model").key == version.tags["askew.model_key"]


def test_many_downloads_at_a_time_give_one_folder(registry: Registry, tmp_path: Path) -> None:
    run_id = registry.start_run("search", "r", {}, {})
    version = registry.register("many", make(tmp_path / "here", "one"), run_id, {})
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: registry.download(version, tmp_path / "there"), range(8)))
    assert set(folders) == set((tmp_path / "there").iterdir())
    assert artifacts.read(folders[0], "model").key == version.tags["askew.model_key"]


def test_files_of_another_model_are_refused(registry: Registry, mlflow_uri: str, tmp_path: Path) -> None:
    """Whoever can write to the server can swap a run's files or point a version elsewhere."""
    run_id = registry.start_run("search", "r", {}, {})
    version = registry.register("swapped", make(tmp_path / "a", "one"), run_id, {})
    registry.log_files(run_id, make(tmp_path / "b", "two"), "model")
    with pytest.raises(RegistryError, match="a model of key"):
        registry.download(version, tmp_path / "there")
    registry.log_files(run_id, make(tmp_path / "a", "one") / "manifest.json", "model")
    with pytest.raises(ArtifactError, match=r"words\.txt"):
        registry.download(version, tmp_path / "there")
    body = {"name": "swapped", "source": "s3://elsewhere/model", "run_id": run_id}
    httpx.post(f"{mlflow_uri}/api/2.0/mlflow/model-versions/create", json=body).raise_for_status()
    with pytest.raises(RegistryError, match="s3://elsewhere"):
        registry.download(registry.resolve("swapped", "2"), tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_half_model_is_not_registered(registry: Registry, tmp_path: Path) -> None:
    folder = make(tmp_path, "one")
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"weights\.safetensors"):
        registry.register("half", folder, registry.start_run("search", "r", {}, {}), {})
    assert registry.find("half", {}) is None


def test_one_file_of_a_version_is_fetched_and_what_is_not_there_is_none(
    registry: Registry, tmp_path: Path
) -> None:
    run_id = registry.start_run("search", "r", {}, {})
    version = registry.register("filed", make(tmp_path, "one"), run_id, {})
    for path in ("evaluation/report.json", "report.json", "model", "evaluation/none/report.json"):
        assert registry.file(version, path, tmp_path / "there") is None, path
    (tmp_path / "report.json").write_text("{}")
    registry.log_files(run_id, tmp_path / "report.json", "evaluation")
    found = registry.file(version, "evaluation/report.json", tmp_path / "there")
    assert found is not None
    assert found.read_text() == "{}"
    assert (tmp_path / "there") in found.parents
    lost = version.model_copy(update={"run_id": "0" * 32})
    with pytest.raises(RegistryError, match=r"evaluation/report\.json of model 'filed' version 1"):
        registry.file(lost, "evaluation/report.json", tmp_path / "there")


def test_an_unknown_run_is_an_error_of_the_registry(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="0123"):
        registry.log_metrics("0123", {"loss": 1.0})


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:{closed}", "http://127.0.0.1:{silent}", "sqlite:///x", "http://"]
)
def test_no_server_is_told_within_5_seconds(uri: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = time.monotonic()
        with pytest.raises(RegistryError, match="MLFLOW_TRACKING_URI"):
            Registry(uri.format(closed=free_port(), silent=silent.getsockname()[1]))
    assert time.monotonic() - begin < 5

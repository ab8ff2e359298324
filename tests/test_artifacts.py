import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.flipping import flips

from askew import artifacts
from askew.errors import ArtifactError

SETTINGS = {"size": 3}


def make(root: Path, content: bytes = b"content") -> Path:
    with artifacts.draft(root, "thing", SETTINGS, {}) as draft:
        (draft.folder / "sub").mkdir()
        (draft.folder / "sub" / "file").write_bytes(content)
        draft.counts["rows"] = 1
    return artifacts.place(root, "thing", artifacts.key("thing", SETTINGS, {}))


def test_a_draft_becomes_whole(tmp_path: Path) -> None:
    manifest = artifacts.read(make(tmp_path), "thing")
    assert manifest.counts == {"rows": 1}
    assert manifest.files["sub/file"].bytes == 7
    assert [p.name for p in tmp_path.iterdir()] == [f"thing-{manifest.key[:12]}"]


def fail(root: Path) -> None:
    with artifacts.draft(root, "thing", SETTINGS, {}) as draft:
        (draft.folder / "file").write_bytes(b"half")
        raise RuntimeError


def test_a_draft_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fail(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    folder = make(tmp_path)
    stale = tmp_path / f".{folder.name}.99999"
    stale.mkdir()
    make(tmp_path)
    assert not stale.exists()


def test_what_a_killed_process_had_for_a_while_is_cleared_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    code = """if True:
        import pathlib, sys
        from askew import artifacts
        with artifacts.scratch(pathlib.Path(sys.argv[1])) as folder:
            (folder / "file").write_bytes(b"half")
            print(folder, flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        old = time.time() - artifacts.YOUNG_S - 1
        os.utime(theirs, (old, old))
        with artifacts.scratch(tmp_path) as ours:
            assert {path.name for path in tmp_path.iterdir()} == {theirs.name, ours.name}
            assert (theirs / "file").exists()
        other.kill()
        other.wait()
        os.utime(theirs, (old, old))
        with artifacts.scratch(tmp_path) as ours:
            assert [path.name for path in tmp_path.iterdir()] == [ours.name]
    assert not [*tmp_path.iterdir()]


class Killed(BaseException):
    """What a test puts in the place of a kill."""


def kept(root: Path) -> Path:
    with artifacts.draft(root, "thing", SETTINGS, {}, resume=True) as draft:
        work = draft.folder / artifacts.WORK
        work.mkdir(exist_ok=True)
        done = sorted(path.name for path in work.iterdir())
        assert done in ([], ["0", "1", "2"])  # never half of it
        for name in "012":
            (work / name).write_bytes(b"done")
        (draft.folder / "file").write_bytes(b"content")
    return artifacts.place(root, "thing", artifacts.key("thing", SETTINGS, {}))


@pytest.mark.parametrize("at", ["_checksums", "rmtree", "_publish"])
def test_a_draft_killed_while_it_is_sealed_has_all_of_its_work_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    publish = artifacts._publish

    def killed(path: Path, *rest: Any, **_: Any) -> None:
        if not path.exists():  # what an earlier draft left
            return
        if at == "rmtree":
            (path / "1").unlink()
        if at == "_publish":  # sealed, and not named
            publish(path, tmp_path / "elsewhere", rest[1])
            (tmp_path / "elsewhere").rename(path)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.shutil if at == "rmtree" else artifacts, at, killed)
        with pytest.raises(Killed):
            kept(tmp_path)
    assert sorted(artifacts.read(kept(tmp_path), "thing").files) == ["file"]
    assert not list(tmp_path.glob(".thing-*draft"))


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, bytes(range(64)))
    for _ in flips(folder / "sub" / "file"):
        with pytest.raises(ArtifactError, match="sub/file"):
            artifacts.read(folder, "thing")


@pytest.mark.parametrize("harm", ["truncate", "extend", "remove", "link"])
def test_an_altered_file_is_refused_by_name(tmp_path: Path, harm: str) -> None:
    path = make(tmp_path) / "sub" / "file"
    if harm == "truncate":
        path.write_bytes(b"conten")
    elif harm == "extend":
        path.write_bytes(b"content ")
    else:
        path.rename(tmp_path / "elsewhere")
    if harm == "link":
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="sub/file"):
        artifacts.read(path.parent.parent, "thing")


def test_a_wrong_kind_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'other'"):
        artifacts.read(make(tmp_path), "other")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        artifacts.read(tmp_path / "absent", "thing")


def test_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / artifacts.MANIFEST).write_text('{"format": 1}')
    with pytest.raises(ArtifactError, match="manifest"):
        artifacts.read(folder, "thing")


@pytest.mark.parametrize("name", ["../sub/file", "/etc/hostname", "sub/../../x", "a\0b", "", "x" * 300])
def test_a_manifest_that_names_what_lies_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path)
    told = json.loads((folder / artifacts.MANIFEST).read_text())
    told["files"][name] = told["files"].pop("sub/file")
    del told["sum"]
    (folder / artifacts.MANIFEST).write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match="files inside of"):
        artifacts.read(folder, "thing", verify=False)


def test_a_part_whose_manifest_is_none_is_refused(tmp_path: Path) -> None:
    with artifacts.draft(tmp_path, "thing", {}, {}) as draft, artifacts.part(draft.folder / "sub", "part", {}):
        pass
    folder = artifacts.place(tmp_path, "thing", artifacts.key("thing", {}, {}))
    for content in (b"[]", b'{"kind": "part"}', b"{"):
        (folder / "sub" / artifacts.MANIFEST).write_bytes(content)
        file = artifacts.File(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        manifest = artifacts.read(folder, "thing", verify=False)
        changed = manifest.model_copy(update={"files": {f"sub/{artifacts.MANIFEST}": file}, "sum": ""})
        (folder / artifacts.MANIFEST).write_text(changed.model_dump_json())
        with pytest.raises(ArtifactError, match="sub/manifest"):
            artifacts.read(folder, "thing")


def test_every_flipped_bit_of_a_manifest_is_refused_though_no_file_is_checked(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for _ in flips(folder / artifacts.MANIFEST):
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            artifacts.read(folder, "thing", verify=False)


def test_a_manifest_from_before_there_were_sums_is_read(tmp_path: Path) -> None:
    folder = make(tmp_path)
    told = json.loads((folder / artifacts.MANIFEST).read_bytes())
    assert len(told.pop("sum")) == 64
    (folder / artifacts.MANIFEST).write_text(json.dumps(told))
    assert artifacts.read(folder, "thing").sum == ""


def test_the_key_follows_settings_and_inputs() -> None:
    keys = {
        artifacts.key("a", {"x": 1}, {}), artifacts.key("b", {"x": 1}, {}), artifacts.key("a", {"x": 2}, {}),
        artifacts.key("a", {"x": 1}, {"i": "1"}),
    }  # fmt: skip
    assert len(keys) == 4
    assert artifacts.key("a", {"x": 1, "y": 2}, {}) == artifacts.key("a", {"y": 2, "x": 1}, {})


def test_write_text_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file"
    artifacts.write_text(path, "one")
    artifacts.write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file"]  # noqa: PTH208

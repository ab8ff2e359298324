"""The pipeline: what it refuses before it starts, and its five stages on a real Ray cluster and MLflow server."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from askew import artifacts, config, pipeline
from askew.errors import ConfigError, RegistryError
from askew.evaluation import EvaluateSettings
from askew.indexing import IndexSettings
from askew.pipeline import KEYS, PipelineSettings, run
from askew.recipes import TrainSettings
from askew.registry import Registry, Version
from askew.triplets import PrepareSettings

ROOT = Path(__file__).parent.parent
FILE = ROOT / "jobs" / "pipeline.yaml"
STAGES = ["prepare", "train", "index", "evaluate"]
NOWHERE = "http://127.0.0.1:9"
SMALL = (
    "prepare.image_size=32", "train.towers.image_size=32", "train.towers.dim=16", "train.towers.text.width=16",
    "train.towers.text.heads=2", "train.stages.joint.steps=4", "train.batch_size=16", "train.num_workers=1",
    "train.bf16=false", "train.checkpoint_every=2", "index.num_workers=1", "evaluate.resamples=200",
    "evaluate.modality=false",
)  # fmt: skip


def settings(*changes: str) -> PipelineSettings:
    return config.load(PipelineSettings, FILE, ["data=/data", "root=/root", *changes])


# --- settings ------------------------------------------------------------------------------------


def test_what_is_given_at_the_top_is_passed_down() -> None:
    found = settings("model=shop", f"tracking_uri={NOWHERE}", "train.seed=3", "evaluate.k=200")
    assert found.prepare.data == "/data"
    for block in (found.prepare, found.train, found.index, found.evaluate):
        assert (block.root, block.tracking_uri) == (Path("/root"), NOWHERE)
    assert {found.train.model, found.index.model, found.evaluate.model} == {"shop"}
    assert (found.train.seed, found.evaluate.k, found.promote) == (3, 200, "challenger")


@pytest.mark.parametrize(
    ("block", "kind", "file"),
    [
        ("prepare", PrepareSettings, "prepare.yaml"),
        ("train", TrainSettings, "train.data.yaml"),
        ("index", IndexSettings, "index.yaml"),
        ("evaluate", EvaluateSettings, "evaluate.yaml"),
    ],
)
def test_its_file_asks_for_the_same_artifacts_as_the_stages_own(block: str, kind: Any, file: str) -> None:
    places = ["data=/data", "root=/root", "triplets=/triplets"]
    taken = [place for place in places if place.partition("=")[0] in kind.model_fields]
    own, found = config.load(kind, FILE.with_name(file), taken), getattr(settings(), block)
    assert (own.content(), getattr(own, "model", "")) == (found.content(), getattr(found, "model", ""))


def test_without_a_tracking_uri_all_take_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    found = settings()
    blocks = (found, found.prepare, found.train, found.index, found.evaluate)
    assert {block.tracking_uri for block in blocks} == {"http://mlflow:5000"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("prepare.image_sise=48", r"prepare\.image_sise: no such setting \(is it image_size\?\)"),
        ("train.stages.joint.stepz=3", r"train\.stages\.joint\.stepz: no such setting \(is it steps\?\)"),
        ("index.recall_traget=0.9", r"index\.recall_traget: no such setting \(is it recall_target\?\)"),
        ("evaluate.resample=100", r"evaluate\.resample: no such setting \(is it resamples\?\)"),
        ("indx.kind=flat", r"indx: no such setting \(is it index\?\)"),
        ("index.recall_target=2", r"index\.recall_target: .*less than or equal to 1"),
        ("train=3", "train: "),
        ("promote=hero", "promote: .*'challenger' or 'champion'"),
        ("model=my shop", "model: "),
        ("root=", "root: "),
        ("prepare.data=/other", r"prepare\.data: given"),
        ("train.root=/other", r"train\.root: given"),
        ("evaluate.version=3", r"evaluate\.version: given"),
        ("train.towers.image_size=64", r"prepare\.image_size 48 and train\.towers\.image_size 64"),
        ("prepare.train_split=old", r"prepare\.train_split old and train\.train_split train"),
        ("evaluate.text=poor", r"evaluate\.text poor"),
        ("prepare.negatives={model: askew-demo, version: challenger}", r"prepare\.negatives\.version challenger"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(change)


def test_negatives_may_be_mined_by_a_version_whose_alias_stays() -> None:
    mined = "prepare.negatives={model: askew-demo}"
    assert settings(mined).prepare.negatives.version == "champion"
    for alias in ("champion", "challenger"):  # the training itself names a new version challenger
        with pytest.raises(ConfigError, match=rf"prepare\.negatives\.version {alias}"):
            settings(mined, f"prepare.negatives.version={alias}", "promote=champion")


def test_the_job_ends_with_the_wrong_setting_before_it_does_anything(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/pipeline.py", "jobs/pipeline.yaml", f"data={tmp_path}", f"root={tmp_path}/r"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(
        [*command, "evaluate.resample=100"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("askew: error: ")]
    assert "evaluate.resample" in line
    assert "stage" not in done.stdout
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (f"tracking_uri={NOWHERE}", RegistryError, NOWHERE),
        ("train.towers.text.checkpoint=/nowhere", ConfigError, "/nowhere"),
    ],
    ids=["mlflow", "checkpoint"],
)
def test_what_a_later_stage_needs_is_looked_for_before_the_first(
    monkeypatch: pytest.MonkeyPatch, change: str, error: type[Exception], says: str
) -> None:
    def never(settings: object) -> dict[str, Any]:
        raise AssertionError("the first stage was started")

    monkeypatch.setattr(pipeline, "prepare", never)
    with pytest.raises(error, match=says):
        run(settings(change))


# --- the stages ----------------------------------------------------------------------------------


class Ledger:
    """Notes each stage that ends, and whether it was skipped; interrupts the pipeline after the stage `last`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.last, self.ended = "", list[tuple[str, bool]]()
        for name in STAGES:
            monkeypatch.setattr(pipeline, name, self._noting(name, getattr(pipeline, name)))

    def _noting(self, name: str, stage: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        def noted(settings: Any) -> dict[str, Any]:
            result = stage(settings)
            self.ended.append((name, result["skipped"]))
            if name == self.last:
                raise KeyboardInterrupt
            return result

        return noted


def made_up(registry: Registry, root: Path, text: str) -> Version:
    """Register a model artifact that is none."""
    with artifacts.draft(root, "model", {"text": text}, {}) as draft:
        (draft.folder / "weights.safetensors").write_text(text)
    folder = artifacts.place(root, "model", artifacts.key("model", {"text": text}, {}))
    return registry.register("promoted", folder, registry.start_run("promoted", text, {}, {}), {})


def test_the_last_stage_is_done_again_when_alias_or_tag_is_another(
    mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, wanted = Registry(mlflow_uri), settings("model=promoted")
    one, two = (made_up(registry, tmp_path, text) for text in ("one", "two"))

    def skipped(keys: dict[str, str]) -> bool:
        done = bool(pipeline._promote(registry, wanted, one.version, keys)["skipped"])
        found = registry.resolve("promoted", "challenger")
        assert (found.version, json.loads(found.tags[KEYS])) == (one.version, keys)
        return done

    def interrupted(version: Version, alias: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(registry, "promote", interrupted)
        with pytest.raises(KeyboardInterrupt):
            skipped({"model": "a"})
    assert KEYS in registry.resolve("promoted", one.version).tags
    assert [skipped({"model": "a"}), skipped({"model": "a"})] == [False, True]
    assert [skipped({"model": "b"}), skipped({"model": "b"})] == [False, True]
    registry.promote(two, "challenger")
    assert [skipped({"model": "b"}), skipped({"model": "b"})] == [False, True]


def test_killed_after_any_stage_it_goes_on_and_does_nothing_twice(
    cluster: None, mlflow_uri: str, drawn_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = (f"data={drawn_folder}", f"root={tmp_path}", "model=pipeline", f"tracking_uri={mlflow_uri}")
    wanted, registry, ledger = settings(*SMALL, *places), Registry(mlflow_uri), Ledger(monkeypatch)
    for number, ledger.last in enumerate(STAGES):
        ledger.ended.clear()
        with pytest.raises(KeyboardInterrupt):
            run(wanted)
        assert ledger.ended == [(name, name != ledger.last) for name in STAGES[: number + 1]]
    assert KEYS not in registry.resolve("pipeline", "1").tags
    capfd.readouterr()

    ledger.last = ""
    found = run(wanted)
    assert {name: stage["skipped"] for name, stage in found["stages"].items()} == {
        **dict.fromkeys(STAGES, True), "promote": False,
    }  # fmt: skip
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("askew: stage ")]
    assert lines[0] == "askew: stage prepare: started"
    assert lines[1].startswith("askew: stage prepare: skipped, was done before, ")
    assert lines[-1].startswith("askew: stage promote: done, ")
    assert len(lines) == 10

    keys = found["keys"]
    parts = ["triplets", "model", "index", "evaluation"]
    manifests = {kind: artifacts.read(next(tmp_path.glob(f"{kind}-*")), kind) for kind in parts}
    assert keys == {kind: manifest.key for kind, manifest in manifests.items()}
    assert manifests["model"].inputs == {"triplets": keys["triplets"]}
    assert manifests["index"].inputs == {name: keys[name] for name in ("model", "triplets")}
    assert manifests["evaluation"].inputs == {name: keys[name] for name in ("model", "triplets", "index")}
    version = registry.resolve("pipeline", "challenger")
    assert (version.version, json.loads(version.tags[KEYS])) == ("1", keys)
    assert (found["model"], found["version"], found["alias"]) == ("pipeline", "1", "challenger")
    assert found["release"] == version.tags["askew.release"]
    assert 0 <= found["metrics"]["fused"]["nDCG@10"] <= 1
    json.dumps(found, allow_nan=False)

    again = run(wanted)
    assert again["skipped"]
    assert again["keys"] == keys
    with pytest.raises(RegistryError, match="champion"):
        registry.resolve("pipeline", "champion")
    first = run(wanted.model_copy(update={"promote": "champion"}))
    assert (first["alias"], first["stages"]["promote"]["skipped"]) == ("champion", False)
    assert registry.resolve("pipeline", "champion").version == "1"

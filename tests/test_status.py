"""What parts tell, and what is said of those that do not answer. (The flow test asks a whole stack.)"""

import io
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.test_registry import make

from askew import status
from askew.registry import CHAMPION, Registry

NOBODY = "http://127.0.0.1:9"


def drawn(told: dict[str, Any]) -> str:
    written = io.StringIO()
    Console(file=written, width=160).print(status.drawn(told))
    return written.getvalue()


def test_parts_that_do_not_answer_are_told_in_their_places() -> None:
    told = status.asked(NOBODY, NOBODY, NOBODY)
    assert set(told) == {"cluster", "jobs", "models", "serve", "endpoint"}
    shown = drawn(told)
    for name, part in told.items():
        assert part["found"].startswith("ConnectError"), name
        assert f"{name}  {NOBODY}\n  no answer: {part['found']}; {part['do']}" in shown


def test_a_part_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "PATIENCE_S", 1.2)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        silent, started = f"http://127.0.0.1:{holder.getsockname()[1]}", time.monotonic()
        told = status.asked(silent, NOBODY, silent)
        assert time.monotonic() - started < 5
    assert "ReadTimeout" in told["cluster"]["found"]
    assert "ReadTimeout" in told["endpoint"]["found"]
    assert "ConnectError" in told["models"]["found"]


def test_an_answer_of_another_make_is_told(mlflow_uri: str) -> None:
    told = status.asked(mlflow_uri, NOBODY, mlflow_uri)  # which is no dashboard and no endpoint
    assert "do" in told["cluster"]
    assert "do" in told["serve"]
    assert "do" in told["endpoint"]


def test_models_their_newest_versions_and_aliases(mlflow_uri: str, tmp_path: Path) -> None:
    registry = Registry(mlflow_uri)
    run = registry.start_run("status", "status", {}, {})
    one, _ = (registry.register("told", make(tmp_path, f"{n}"), run, {}) for n in range(2))
    registry.promote(one, CHAMPION)
    told = status.asked(NOBODY, mlflow_uri, NOBODY)
    assert {"name": "told", "newest": "2", "aliases": {CHAMPION: "1"}} in told["models"]["models"]
    assert "champion → 1" in drawn(told)


def test_a_refused_release_is_drawn_with_its_reasons() -> None:
    silence = {"at": NOBODY, "wanted": "an answer", "found": "none", "do": "start it"}
    live = {
        "model": {"name": "shop", "version": "7"}, "model_key": "m", "index_key": "0123456789abcdef",
        "items": 3000, "shards": 2, "since": "2026-01-02T03:04:05Z", "previous": "6", "note": "MLflow is silent",
        "candidate": {"version": "8", "state": "refused", "reasons": ["recall: found [0.9]; tune it"]},
    }  # fmt: skip
    endpoint = {
        "at": "http://x",
        "health": "ok",
        "ready": False,
        "why_not": "1 of 2 shards answer",
        "release": live,
    }
    shown = drawn({**dict.fromkeys(("cluster", "jobs", "models", "serve"), silence), "endpoint": endpoint})
    assert "lives (ok), not ready: 1 of 2 shards answer" in shown
    assert "shop version 7 since 2026-01-02T03:04:05Z, before it version 6" in shown
    assert "index 0123456789ab: 3,000 items in 2 shards" in shown
    assert "version 8: refused\n    recall: found [0.9]; tune it" in shown
    assert "note: MLflow is silent" in shown

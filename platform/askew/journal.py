"""The journal: a training's metrics on disk, as they come; logged to MLflow when it answers, each once.

Knows nothing of what the metrics mean.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from askew import artifacts
from askew.errors import RegistryError
from askew.registry import Registry


class Journal:
    """A file of metrics, a line for each step that is told, and a note of how many are logged."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._refused = folder / "refused.json"
        self._lines, self._sent = folder / "metrics.jsonl", folder / "logged.json"
        self._registry: Registry | None = None

    def start(self, tracking_uri: str, run_id: str) -> None:
        """Name the run that the metrics belong to."""
        artifacts.write_text(self._lines.with_name("run.json"), json.dumps({"uri": tracking_uri, "run": run_id}))

    @property
    def run_id(self) -> str:
        """The run's id; empty before `start`."""
        return str(self._run().get("run", ""))

    def _run(self) -> dict[str, str]:
        path = self._lines.with_name("run.json")
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}

    def write(self, values: dict[str, float], step: int) -> None:
        """Note metrics of a step, and log what is not logged yet; without MLflow they wait here."""
        with self._lines.open("ab") as stream:
            stream.truncate(sum(map(len, self._whole())))  # what a crash cut short was never noted
            stream.write(json.dumps({"step": step, "values": values}).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        try:
            self.send()
        except RegistryError as error:
            print(f"askew: warning: metrics of step {step} wait on disk: {error}", flush=True)

    def _whole(self) -> list[bytes]:
        """The lines, without one at the end that was cut short."""
        data = self._lines.read_bytes() if self._lines.is_file() else b""
        return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)

    def send(self) -> None:
        """Log what is not logged yet. Raises RegistryError; what it did log is noted."""
        lines = self._whole()
        sent = json.loads(self._sent.read_bytes()) if self._sent.is_file() else 0
        run = self._run()
        if sent == len(lines) or not run:
            return
        self._registry = self._registry or Registry(run["uri"])
        for number, line in enumerate(lines[sent:], sent):
            entry = json.loads(line)
            self._registry.log_metrics(run["run"], entry["values"], entry["step"])
            artifacts.write_text(self._sent, str(number + 1))

    @contextmanager
    def watching(self, node: str) -> Iterator[None]:
        """Meanwhile log what this machine does, if MLflow answers: it is not worth keeping."""
        with ExitStack() as stack:
            if run := self._run():
                try:
                    stack.enter_context(Registry(run["uri"]).watching(run["run"], node))
                except RegistryError as error:
                    print(f"askew: warning: what {node} does is not logged: {error}", flush=True)
            yield

    def refuse(self, why: dict[str, Any]) -> None:
        """Note why a training cannot go on."""
        artifacts.write_text(self._refused, json.dumps(why))

    def refused(self) -> dict[str, Any] | None:
        """Why the training could not go on, once: the note is taken away."""
        if not self._refused.is_file():
            return None
        why: dict[str, Any] = json.loads(self._refused.read_bytes())
        self._refused.unlink()
        return why

    def history(self) -> list[tuple[int, dict[str, float]]]:
        """All that was noted, by step; of a step that was done twice, the last."""
        found: dict[int, dict[str, float]] = {}
        for line in self._whole():
            entry = json.loads(line)
            found[entry["step"]] = found.get(entry["step"], {}) | entry["values"]
        return sorted(found.items())

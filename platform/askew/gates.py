"""Stub."""

from collections.abc import Sequence
from pathlib import Path

from askew.config import Settings


class GateSettings(Settings):
    """Stub."""

    recall: float = 0.95


class Verdict(Settings):
    """Stub."""

    gate: str
    holds: bool
    hard: bool
    wanted: str
    found: str

    @property
    def told(self) -> str:
        """Stub."""
        return f"{self.gate}: wanted {self.wanted}; found {self.found}"


def judge(
    model: Path, index: Path, settings: GateSettings, own: Path | None = None, champion: Path | None = None
) -> list[Verdict]:
    """Stub."""
    return []


def refusals(verdicts: Sequence[Verdict], force: bool) -> list[Verdict]:
    """Stub."""
    return [one for one in verdicts if not one.holds and (one.hard or not force)]

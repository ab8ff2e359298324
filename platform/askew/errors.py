"""What can go wrong, as one tree; every message says what was wanted, what was found, what to do.

AskewError
├── ConfigError      a setting is unknown, missing or of the wrong form
├── DataError        a catalogue, its queries or its judgments cannot be used
├── ArtifactError    triplets, a model or an index is missing, half written, altered or of another make
├── RegistryError    MLflow cannot be reached, or holds no such model, version or alias
├── TrainingError    a training went wrong in itself: its loss is no number, or explodes
├── MachineError     this machine lacks memory, disk, a free port or a part
├── StageError       a Ray job ended in failure
└── EndpointError    a search endpoint refused what it was asked, or failed
    └── UnreachableError   nothing answered there, or not in time
"""

from typing import Self


class AskewError(Exception):
    """Base of every error that a person, not a programmer, can mend."""

    def __init__(self, wanted: str, found: str, do: str) -> None:
        super().__init__(wanted, found, do)
        self.wanted, self.found, self.do = wanted, found, do

    def __str__(self) -> str:
        return f"wanted {self.wanted}; found {self.found}; {self.do}"

    def of(self, file: str) -> Self:
        """The same error, which names the file that it was found in."""
        return self if file in str(self) else type(self)(f"{self.wanted} in {file}", self.found, self.do)


class ConfigError(AskewError):
    """A setting is unknown, missing or of the wrong form."""


class DataError(AskewError):
    """A catalogue, its queries or its judgments cannot be used."""


class ArtifactError(AskewError):
    """An artifact is missing, half written, altered or of another make."""


class RegistryError(AskewError):
    """MLflow cannot be reached, or holds no such model, version or alias."""


class TrainingError(AskewError):
    """A training went wrong in itself: its loss is no number, or explodes."""


class MachineError(AskewError):
    """This machine lacks memory, disk, a free port or a part."""


class StageError(AskewError):
    """A Ray job ended in failure."""

    exit_code = 2  # of the job, where it is known


class EndpointError(AskewError):
    """A search endpoint refused what it was asked, or failed; what it said stands in the attributes."""

    def __init__(
        self, wanted: str, found: str, do: str, *, code: str = "", message: str = "", param: str | None = None,
        status: int = 0, request_id: str = "",
    ) -> None:  # fmt: skip
        super().__init__(wanted, found, do)
        self.code, self.message, self.param, self.hint = code, message or found, param, do
        self.status, self.request_id = status, request_id  # the status of HTTP; 0 without an answer


class UnreachableError(EndpointError):
    """Nothing answered there, or not in time."""

"""Settings: one frozen pydantic model a YAML file, unknown keys refused by name.

Knows nothing of any stage: each stage declares its own settings on top of `Settings`.
"""

import difflib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from askew.errors import AskewError, ConfigError

MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 1_000_000, 100_000, 50  # of a file of settings


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)


S = TypeVar("S", bound="Settings")


def load(kind: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """Read settings from a YAML file, then apply `dotted.key=value` overrides (values are YAML).

    Raises ConfigError naming the file and the keys when it cannot be read or does not fit.
    """
    values = read_yaml(path)
    for override in overrides:
        change(values, override)
    return fitted(kind, values, f"{path}, or what is set beside it" if overrides else str(path))


def fitted(kind: type[S], values: Mapping[str, Any], path: str) -> S:
    """Make settings of values that were read from `path`. Raises ConfigError naming the keys that do not fit."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"settings that fit {kind.__name__}", _summary(error, kind), f"mend {path}") from error


RESULT = "askew: result: "


def main(kind: type[S], stage: Callable[[S], Mapping[str, Any]], doc: str) -> NoReturn:
    """Run `stage` as a script: `python jobs/STAGE.py SETTINGS.yaml [key=value ...]`.

    The last line printed is `askew: result: {json}`. Exits 2 with one line on an AskewError, so that a
    job's log ends with what to do.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{doc.strip()}\n\nusage: python {sys.argv[0]} SETTINGS.yaml [key=value ...]")
        sys.exit(0 if arguments else 2)
    try:
        result = stage(load(kind, Path(arguments[0]), arguments[1:]))
    except AskewError as error:
        print(f"askew: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(RESULT + json.dumps(result), flush=True)
    sys.exit(0)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values. Raises ConfigError when there is none, or it is something else."""
    try:
        values = _parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("a settings file", f"none at {path}", "check the path") from None
    except OSError as error:
        raise ConfigError(f"a settings file at {path}", str(error.strerror), "check the path") from error
    except ValueError as error:
        found = " ".join(str(error).split())
        raise ConfigError(f"YAML in {path}", found, "mend the line that it names") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"key: value pairs in {path}", type(values).__name__, "mend the file")
    return values


def _parsed(text: str) -> Any:
    """Parse YAML. Raises ValueError, for what is none and for what is too large or nested too deep."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, more than {MAX_CHARACTERS:,}")
    try:
        values = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"values nested more than {MAX_DEPTH} deep") from None
    except Exception as error:  # the library raises whatever it stumbles over at odd dates, numbers and tags
        raise ValueError(str(error) or type(error).__name__) from error
    _refuse_bombs(values)
    return values


def _refuse_bombs(values: Any) -> None:
    """Raise ValueError when aliases make more of a file than it has words, or values are nested too deep."""
    level, size = [values], 0
    for _ in range(MAX_DEPTH):
        size += len(level)
        if size > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values, those that aliases repeat counted each time")
        inner = (one.values() if isinstance(one, dict) else one if isinstance(one, list) else () for one in level)
        level = list(itertools.islice(itertools.chain.from_iterable(inner), MAX_VALUES + 1))
    if level:
        raise ValueError(f"values nested more than {MAX_DEPTH} deep")


def change(values: dict[str, Any], override: str) -> None:
    """Apply one `dotted.key=value` to values, in place. Raises ConfigError when it is none, or finds no group."""
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise ConfigError("an override of the form key=value", repr(override), "write it as a.b=1")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"a group of settings at {parent!r}", type(values).__name__, f"mend {override!r}")
    try:
        values[last] = _parsed(text)
    except ValueError as error:
        raise ConfigError("a value of YAML", repr(override), "put it in quotes") from error


def _summary(error: ValidationError, kind: type[BaseModel]) -> str:
    return "; ".join(_told(dict(one), kind) for one in error.errors())


def _told(one: dict[str, Any], kind: type[BaseModel]) -> str:
    """Tell one thing that does not fit; of a name that is none of ours, which it is like."""
    where = ".".join(map(str, one["loc"])) or "the file"
    if one["type"] != "extra_forbidden":
        return f"{where}: {one['msg']}"
    near = difflib.get_close_matches(str(one["loc"][-1]), _names(kind, one["loc"][:-1]), 1)
    return f"{where}: no such setting" + (f" (is it {near[0]}?)" if near else "")


def _names(kind: type[BaseModel], place: Sequence[int | str]) -> Sequence[str]:
    """The names of settings at a place below a kind of settings, where the place can be told."""
    for part in place:
        if field := kind.model_fields.get(str(part)):
            inner = [one for one in (field.annotation, *get_args(field.annotation)) if isinstance(one, type)]
            kind = next((one for one in inner if issubclass(one, BaseModel)), kind)
    return list(kind.model_fields)

"""docs/configuration.md is what the settings say of themselves."""

import importlib
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from askew import reference
from askew.config import Settings

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configuration.md"
INTERNAL = {  # settings that no person writes: what stages hand on, and what files on disk hold
    "About", "CleanSettings", "PairSettings", "LayoutSettings", "Design", "Effort", "File", "Kept", "Key",
    "KeyFile", "Known", "Manifest", "Models", "Ports", "RegisteredModel", "Release", "Run", "Stack", "State",
    "Verdict", "Version", "_Told",
}  # fmt: skip


class Inner(Settings):
    """Inside."""

    width: int = Field(default=4, ge=1, le=8)  # of the inside,
    # in units


class Outer(Settings):
    """Outside.

    More of it.
    """

    name: str  # what it is called
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner(width=6)
    many: tuple[Inner, ...] = ()
    shares: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    bound: float | None = None


def rows(notes: dict[str, str]) -> dict[str, reference.Row]:
    return {row.key: row for row in reference._rows(Outer, None, "", notes, {})}


def test_how_fields_are_told() -> None:
    found = rows({"kind": "said in YAML", "name": "not said twice"})
    assert found["name"] == ("name", "text", "**required**", "", "what it is called")
    assert found["kind"] == ("kind", "a, b", "`a`", "", "said in YAML")
    assert found["inner.width"] == ("inner.width", "whole number", "`6`", "≥ 1, ≤ 8", "of the inside, in units")
    assert found["many"][1:3] == ("list of [Inner](#inner)", "`[]`")
    assert found["shares"][1:3] == ("map of text to number > 0", "`{}`")
    assert found["bound"][1:3] == ("number or empty", "empty")


def test_comments_of_a_settings_file() -> None:
    text = "a:  # first\n  b: 1   # second,\n         # and more\n  # c: 2  # off\nd: '#'\n"
    assert reference._yaml_comments(text) == {"a": "first", "a.b": "second, and more", "a.c": "off", "d": ""}
    serve = "applications:\n  - name: x\n    args:\n      k: 1  # said\n"
    assert reference._yaml_comments(serve)["k"] == "said"


def test_the_page_is_what_the_settings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.page(), "run `make docs`"


def test_every_setting_is_explained() -> None:
    table = re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(table) > 150
    assert [key for key, said in table if not said.strip()] == []


def subclasses(kind: type[Settings]) -> set[type[Settings]]:
    direct = set(kind.__subclasses__())
    return direct.union(*map(subclasses, direct))


@pytest.fixture(scope="module")
def ours() -> set[type[Settings]]:
    """All settings that askew has, but for those that others are made from."""
    for path in (ROOT / "platform" / "askew").glob("*.py"):
        importlib.import_module(f"askew.{path.stem}")
    found = {one for one in subclasses(Settings) if one.__module__.startswith("askew.")}
    return found - {base for one in found for base in one.__mro__[1:]}


def test_every_settings_class_is_on_the_page_or_internal(ours: set[type[Settings]]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    told = {one for one in ours if f"## {one.__name__}\n" in text}
    for _ in range(3):  # groups stand as dotted keys of what they are in
        told |= {field.annotation for one in told for field in one.model_fields.values()} & ours  # type: ignore[operator]
    assert {one.__name__ for one in ours - told} == INTERNAL

"""What is installed: every dependency is pinned, and docs/updating.md names tests and targets that there are."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
PAGE = (ROOT / "docs" / "updating.md").read_text(encoding="utf-8")


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("needed", NEEDED, ids=lambda needed: needed.name)
def test_a_dependency_is_pinned_at_what_is_installed_or_newer(needed: Requirement) -> None:
    version = pinned()[canonicalize_name(needed.name)]
    assert version in needed.specifier
    assert version >= Version(Version(importlib.metadata.version(needed.name)).public)


def test_what_dependencies_need_is_pinned_too() -> None:
    """Those of this system, that are installed."""
    known, open_, seen = pinned(), [(needed.name, needed.extras) for needed in NEEDED], set()
    while open_:
        name, extras = open_.pop()
        if (canonicalize_name(name), *extras) in seen:
            continue
        seen.add((canonicalize_name(name), *extras))
        assert canonicalize_name(name) in known | {"setuptools": 0}, name
        for line in importlib.metadata.requires(name) or ():
            inner = Requirement(line)
            wanted = [{"extra": extra} for extra in (extras or {""})]
            if inner.marker is None or any(inner.marker.evaluate(one) for one in wanted):
                open_.append((inner.name, inner.extras))
    assert len(seen) > 100


def test_the_page_names_tests_and_targets_that_there_are() -> None:
    tests = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(tests) > 15
    assert {name for name in tests if not (ROOT / "tests" / f"{name}.py").is_file()} == set()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", PAGE):
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), target

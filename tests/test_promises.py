"""docs/promises.md: every row of every table names a test that exists, or what a make target judges."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([^`]+)`")
TEST, TARGET = re.compile(r"(tests/test_\w+\.py)::(test_\w+)(\[.+\])?"), re.compile(r"make ([\w-]+): (\w+)")


def rows(page: str) -> Iterator[list[str]]:
    """The rows of all tables, cell by cell, without heads and rules."""
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        for line in table.splitlines()[2:]:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}


def judged(script: Path) -> list[str]:
    """Patterns of all words in a script and in those that it imports, "failed_{kind}" being any that begins so."""
    found = []
    nodes = [*ast.walk(ast.parse(script.read_text(encoding="utf-8")))]
    imported = [one.name for node in nodes if isinstance(node, ast.Import) for one in node.names]
    for path in (script.with_name(f"{name}.py") for name in imported):
        nodes += ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else []
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = (re.escape(p.value) if isinstance(p, ast.Constant) else r"\w+" for p in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.escape(node.value))
    return [one for one in found if re.search(r"\w{3}", one.replace(r"\w+", ""))]


def trouble(row: list[str]) -> str | None:
    """What a row lacks; None when all that it names is there."""
    if len(row) != 3 or not all(row):
        return "three cells"
    named = NAMED.findall(row[2])
    if not named:
        return "a test"
    for one in named:
        if test := TEST.fullmatch(one):
            path = ROOT / test[1]
            if not path.exists() or test[2] not in functions(path):
                return one
        elif target := TARGET.fullmatch(one):
            recipe = re.search(rf"^{target[1]}:.*\n(?:\t.*\n)*?\t.*(bench/\w+\.py)", MAKEFILE, re.MULTILINE)
            if recipe is None or not any(re.fullmatch(word, target[2]) for word in judged(ROOT / recipe[1])):
                return one
        else:
            return one
    return None


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_promise_names_a_test_that_exists() -> None:
    promises = list(rows(PAGE))
    assert len(promises) > 50
    assert {row[0]: found for row in promises if (found := trouble(row))} == {}


def test_no_fault_stands_twice() -> None:
    faults = [row[0] for row in rows(PAGE)]
    assert sorted(faults) == sorted(set(faults))


@pytest.mark.parametrize(
    ("proof", "found"),
    [
        ("", "three cells"),
        ("believe it", "a test"),
        ("`tests/test_flow.py`", "tests/test_flow.py"),
        ("`tests/test_none.py::test_a`", "tests/test_none.py::test_a"),
        ("`tests/test_promises.py::test_absent`", "tests/test_promises.py::test_absent"),
        ("`make chaos: failed_shard`, `make chaos: believed`", "make chaos: believed"),
        ("`make nothing: failed`", "make nothing: failed"),
        ("`make test: failed`", "make test: failed"),
        ("`tests/test_promises.py::test_no_fault_stands_twice[one]`, `make chaos: failed_shard`", None),
    ],
)
def test_a_row_that_proves_nothing_is_found(proof: str, found: str | None) -> None:
    [row] = rows(f"| fault | promise | proved by |\n|---|---|---|\n| a | b | {proof} |\n")
    assert trouble(row) == found

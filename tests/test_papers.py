"""Every function and class that docs/papers.md names as computing something is there, and every recipe."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([a-z_]+)\.([A-Za-z_]\w*(?:\.\w+)?)`", PAGE)))


def stands(module: str, name: str) -> bool:
    """Whether a module of askew defines a function, a class, or a class's method."""
    path = ROOT / "platform" / "askew" / f"{module}.py"
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []
    for part in name.split("."):
        found = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
        if not found:
            return False
        body = found[0].body
    return True


def test_what_it_names_is_there() -> None:
    named = [one for one in NAMED if one != ("module", "name")]
    assert len(named) > 15
    assert [one for one in named if not stands(*one)] == []


def test_its_recipes_are_there() -> None:
    recipes = re.findall(r"`(jobs/[\w.]+)`", PAGE)
    assert {"jobs/train.smar.yaml", "jobs/train.beyond_text.yaml"} <= set(recipes)
    assert [one for one in recipes if not (ROOT / one).is_file()] == []

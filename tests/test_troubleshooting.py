"""Every message that docs/troubleshooting.md quotes is one that the code says."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def templates() -> list[str]:
    """All texts of the source, … in the place of what is filled in."""
    found = []
    for path in (ROOT / "platform").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (one.value if isinstance(one, ast.Constant) else "…" for one in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def messages() -> list[str]:
    return re.findall(r"^\| `([^`]+)`", PAGE, re.MULTILINE)


def clauses(message: str) -> list[str]:
    """The parts of a message that stand in the source one by one: wanted, found, what to do."""
    parts = re.split(r"; found |; ", message.removeprefix("wanted "))
    return [part for part in parts if part.strip("… ")]


def test_there_are_messages() -> None:
    assert len(messages()) > 30


def test_every_message_stands_in_the_source() -> None:
    known = templates()
    missing = [(m, part) for m in messages() for part in clauses(m) if not any(part in one for one in known)]
    assert missing == []


def test_no_message_stands_twice() -> None:
    assert len(set(messages())) == len(messages())

"""The documents hold what they say: their code is run or checked, their links lead somewhere, none is left out.

A block of code is run by a test, checked here by its language, or marked with the reason on the line above it:
`<!-- not run: … -->`. `<!-- file: … -->` says that a test writes the block to a file and uses it.
"""

import ast
import importlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from pydantic import TypeAdapter

from askew import cli, endpoint, messages, reference
from askew.recipes import StageSettings
from askew.sources import Layout

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
USERS = {
    "make_shop.py": "test_your_data.py",
    "check_artifacts.py": "test_operations.py",
}  # of blocks that are files
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r"not run: .{10,}|file: (?P<file>[\w.-]+)")
LINK = re.compile(r"!?\[[^\]]*\]\((?P<to>[^)\s]+)\)")
EXAMPLES = [
    path.read_text(encoding="utf-8") for path in (ROOT / "examples").iterdir()
]  # test_examples.py runs them
PLAIN = {"source", "cd", "head", "python"}  # commands that are the shell's own, or run by a block's test


class Block(NamedTuple):
    page: Path
    line: int
    mark: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in FENCE.finditer(text):
            line = text.count("\n", 0, found.start("kind")) + 1
            yield Block(page, line, found["mark"] or "", found["kind"], found["text"])


# --- code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", list(blocks()), ids=str)
def test_a_block_is_run_checked_or_marked(block: Block) -> None:
    if block.mark:
        found = MARK.fullmatch(block.mark)
        assert found, f"{block}: the mark {block.mark!r} is none that is known"
        if name := found["file"]:
            assert f"{name}" in (ROOT / "tests" / USERS[name]).read_text(encoding="utf-8")
    elif block.text not in EXAMPLES:
        CHECKS[block.kind](block)


def shell(block: Block) -> None:
    for line in re.sub(r"\\\n", " ", block.text).splitlines():
        words = shlex.split(line, comments=True)
        if not words or re.fullmatch(r"\w+=.*", words[0]):
            continue
        if words[:2] == ["ray", "job"] or words[0] == "$submit":  # what is submitted is a command itself
            words = words[words.index("--") + 1 :] if "--" in words else words[1:]
        known = COMMANDS.get(words[0])
        assert known or words[0] in PLAIN, f"{block}: mark {words[0]!r}, or check it"
        if known:
            known(words[1:])


def made(words: list[str]) -> None:
    """`make target NAME=…`, or `make -C folder …`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    words = words[2:] if words[0] == "-C" else words
    target, *variables = words
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
    for name in (word.partition("=")[0] for word in variables):
        assert f"$({name})" in makefile or f"$({name}:" in makefile, f"{target} takes no {name}"


def scripted(words: list[str]) -> None:
    """`python jobs/STAGE.py SETTINGS.yaml key=value …`."""
    if not words[0].startswith("jobs/"):
        return
    script = (ROOT / words[0]).read_text(encoding="utf-8")
    [kind] = [one for one in reference.FILES if f" {one.__name__}" in script]
    values = yaml.safe_load((ROOT / words[1]).read_text(encoding="utf-8"))
    for word in words[2:]:
        key = word.partition("=")[0].split(".")
        assert word == "…" or key[0] in kind.model_fields, f"{words[0]} takes no {word}"
    assert set(values) <= set(kind.model_fields)


def asked(words: list[str]) -> None:
    """`curl … address/path -d body`: the path is the endpoint's, and the body fits it."""
    address = next(word for word in words if re.match(r"(https?://)?127\.0\.0\.1", word))
    path = "/" + address.partition("://")[2 if "://" in address else 0].partition("/")[2]
    if path == "/":
        return
    paths = {"/search": messages.SearchRequest, "/search/batch": messages.BatchRequest}
    paths |= {"/similar": messages.SimilarRequest, "/items:upsert": messages.UpsertRequest}
    paths |= {"/items:delete": messages.DeleteRequest, "/facets": messages.FacetsRequest}
    if "-d" in words:
        paths[path].model_validate_json(words[words.index("-d") + 1])
    else:
        source = Path(endpoint.__file__).read_text(encoding="utf-8")
        assert f'"{path}"' in source, f"no path {path}"


def typed(words: list[str]) -> None:
    """`askew command …`: the command takes these options."""
    command = typer.main.get_group(cli.app).commands[words[0]]
    options = {name for parameter in command.params for name in parameter.opts}
    for word in words[1:]:
        assert not word.startswith("--") or word.partition("=")[0] in options, f"askew {words[0]} takes no {word}"


def deployed(words: list[str]) -> None:
    """`serve deploy … config.yaml`."""
    assert words[0] in ("deploy", "status", "shutdown")
    for word in words:
        assert not word.endswith(".yaml") or (ROOT / word).is_file(), f"no {word}"


def python(block: Block) -> None:
    """Syntax, and that what is imported from askew is there."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("askew"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")


def settings(block: Block) -> None:
    """YAML, and its blocks the settings that they are."""
    values = yaml.safe_load(block.text)
    for name, kind in GROUPS.items():
        if name in values:
            TypeAdapter(kind).validate_python(values[name])


GROUPS: dict[str, Any] = {"layout": Layout, "stages": dict[str, StageSettings]}
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "make": made, "python": scripted, "curl": asked, "askew": typed, "serve": deployed,
}  # fmt: skip
CHECKS: dict[str, Callable[[Block], object]] = {
    "sh": shell, "python": python, "yaml": settings, "json": lambda block: json.loads(block.text),
    "": lambda block: None,  # what is seen, not what is typed
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sh", "make nothing\n"), ("sh", "make demo NOTHING=1\n"), ("sh", "frobnicate\n"),
        ("sh", "askew promote a 1 --nothing\n"), ("sh", "serve deploy serve_configs/nothing.yaml\n"),
        ("sh", "python jobs/index.py jobs/index.yaml nothing=1\n"), ("sh", "curl 127.0.0.1:8000/nothing\n"),
        ("sh", "curl 127.0.0.1:8000/search -d '{\"nothing\": 1}'\n"), ("json", "{"), ("ruby", "1"),
        ("python", "from askew.ann import Nothing\n"), ("yaml", "layout: {nothing: 1}\n"),
    ],
)  # fmt: skip
def test_a_block_that_is_wrong_is_found(kind: str, text: str) -> None:
    with pytest.raises((AssertionError, ImportError, KeyError, ValueError)):
        CHECKS[kind](Block(Path("page.md"), 1, "", kind, text))


# --- links ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What can be linked to in a page: its headings as GitHub writes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for found in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        to, _, anchor = found["to"].partition("#")
        if re.match(r"https?://", to):
            continue
        target = (page.parent / to).resolve() if to else page
        assert target.is_relative_to(ROOT), f"{page.name}: {found['to']}"
        assert target.exists(), f"{page.name}: {found['to']}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {found['to']}"


def test_the_index_lists_every_document_once() -> None:
    index = ROOT / "docs" / "README.md"
    listed = re.findall(r"^- \[([\w-]+\.md)\]\(\1\): \S", index.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page != index)


def test_every_file_of_the_documents_is_used() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = {path.name for path in (ROOT / "docs").iterdir() if path.suffix != ".md"}
    assert {name for name in files if name not in text} == set()

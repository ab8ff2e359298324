"""docs/your-data.md is followed word for word in an empty folder: its files are written, its commands run.

The page's commands are one session of a shell, with the ports of this test in its environment. Two things are not
as they are for a person: the checkout beside the shop is one of links to this one, whose packages are those that
run this test, and `make` is told that they are installed.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from askew import local

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = "file: make_shop.py"
INSTALLED = 'set -e\nmake() { command make --old-file=.venv/installed "$@"; }\n'
MARK = "=== block {} ==="
pytestmark = pytest.mark.timeout(900)  # beside other work; four minutes on two cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder with a checkout in it; whatever was started from there is ended."""
    folder = tmp_path_factory.mktemp("yours")
    checkout = folder / "askew"
    checkout.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".git"):
            (checkout / path.name).symlink_to(path)
    (checkout / ".venv").symlink_to(sys.prefix)
    yield folder
    local.stop(folder / "shop-demo")


@pytest.fixture(scope="module")
def said(folder: Path) -> list[tuple[str, str]]:
    """Each block of commands by its first, and what it says; the page's files are there before."""
    blocks = [(mark, text) for mark, kind, text in BLOCK.findall(PAGE) if kind in ("sh", "python")]
    [shop] = [text for mark, text in blocks if mark == FILE]
    (folder / "make_shop.py").write_text(shop)
    typed = [text for mark, text in blocks if not mark]
    session = "".join(f"echo '{MARK.format(number)}'\n{text}" for number, text in enumerate(typed))
    ports = {
        f"{name.upper()}_PORT": str(port) for name, port in zip(local.PURPOSES, local.free_ports(4), strict=True)
    }
    environment = {**os.environ, **ports, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(
        ["bash", "-c", INSTALLED + session], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=850, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    parts = re.split(MARK.format(r"\d+") + "\n", done.stdout)[1:]
    return [(block.splitlines()[0], part) for block, part in zip(typed, parts, strict=True)]


def told(said: list[tuple[str, str]], words: str) -> list[str]:
    """What the blocks say whose first command has these words."""
    return [text for command, text in said if words in command]


def shown(first: str) -> str:
    """The block of the page that shows what is seen, by its first words."""
    [text] = [text for _, kind, text in BLOCK.findall(PAGE) if not kind and text.startswith(first)]
    return str(text)


def test_the_files_are_those_that_the_page_shows(said: list[tuple[str, str]]) -> None:
    assert told(said, "make_shop.py") == [shown("==> shop/items.csv")]


def test_every_stage_says_that_it_is_done(said: list[tuple[str, str]]) -> None:
    [output] = told(said, " demo ")
    for line in shown("✓ prepare").splitlines():
        assert re.search(rf"^{line} ", output, re.MULTILINE), output
    assert "quarantined" not in output


def test_searches_find_products(said: list[tuple[str, str]], folder: Path) -> None:
    first, second = (json.loads(text) for text in told(said, "/search"))
    assert len(first["hits"]) == len(second["hits"]) == 3
    assert any(hit["item_id"].startswith("mug-") for hit in first["hits"])
    assert all(hit["fields"]["price"] < 20 for hit in second["hits"])
    assert list((folder / "shop-demo" / "artifacts").glob("triplets-*/overview.html"))


def test_stop_ends_it(said: list[tuple[str, str]], folder: Path) -> None:
    assert re.search(r"\d+ processes ended", told(said, " stop ")[0])
    assert local.find(folder / "shop-demo") is None
    assert list((folder / "shop-demo" / "artifacts").glob("index-*"))

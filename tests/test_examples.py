"""The examples, run as they stand against the real application; and the page that shows them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes import HIT, FakeSearcher, serving

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").iterdir())
SAID = """\
towers 3 serves 9 products
0.500 Red mug, 4
like Red mug: Red mug
refused: invalid_field k: Input should be less than or equal to 100
"""


@pytest.fixture
def searcher() -> FakeSearcher:
    return FakeSearcher()


@pytest.fixture
def url(searcher: FakeSearcher) -> Iterator[str]:
    with serving(searcher) as url:
        yield url


def ran(program: str, name: str, url: str) -> subprocess.CompletedProcess[str]:
    if not (found := shutil.which(program)):
        pytest.skip(f"there is no {program} here")
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "NO_PROXY": "127.0.0.1"}
    environment = os.environ | paths | {"ASKEW_URL": url}
    command = [found, str(ROOT / "examples" / name)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def asked(searcher: FakeSearcher) -> list[Any]:
    return [(ask.query, ask.like, ask.k, ask.where) for ask in searcher.asks]


WANTED = [("red striped mug", "", 3, {"price": {"lt": 20}}), ("", "7", 3, None)]


@pytest.mark.parametrize(("program", "name"), [(sys.executable, "search.py"), ("node", "search.mjs")])
def test_an_example_searches_and_says_what_went_wrong(
    program: str, name: str, url: str, searcher: FakeSearcher
) -> None:
    example = ran(program, name, url)
    assert (example.stdout, example.stderr, example.returncode) == (SAID, "", 0)
    assert asked(searcher) == WANTED


def test_curl_shows_the_endpoints_own_answers(url: str, searcher: FakeSearcher) -> None:
    if not shutil.which("curl"):
        pytest.skip("there is no curl here")
    example = ran("sh", "search.sh", url)
    assert (example.stderr, example.returncode) == ("", 0)
    lines = dict(line.split(": ", 1) for line in example.stdout.splitlines())
    told = {name: json.loads(line) for name, line in lines.items()}
    assert told["release"]["model"]["version"] == "3"
    assert [hit["title"] for hit in told["found"]["hits"]] == [HIT["title"]]
    assert [hit["item_id"] for hit in told["like it"]["hits"]] == [HIT["item_id"]]
    assert (told["refused"]["error"]["code"], told["refused"]["error"]["param"]) == ("invalid_field", "k")
    assert asked(searcher) == WANTED


@pytest.mark.parametrize(
    ("program", "name", "told"),
    [
        (sys.executable, "search.py", "wanted an askew endpoint at http://127.0.0.1:1; found ConnectError"),
        ("node", "search.mjs", "fetch failed"),
        ("sh", "search.sh", "Failed to connect"),
    ],
)
def test_an_example_without_an_endpoint_fails(program: str, name: str, told: str) -> None:
    example = ran(program, name, "http://127.0.0.1:1")
    assert example.returncode != 0
    assert told in example.stderr


class Once:
    """True the first time that it is looked at."""

    def __init__(self) -> None:
        self.times = 0

    def __bool__(self) -> bool:
        self.times += 1
        return self.times == 1


def test_javascript_waits_for_a_busy_endpoint(url: str, searcher: FakeSearcher) -> None:
    searcher.busy = Once()  # type: ignore[assignment]
    example = ran("node", "search.mjs", url)
    assert (example.stdout, example.stderr) == (SAID, "")
    assert searcher.busy.times > 1


def test_the_page_shows_every_example_as_it_is() -> None:
    page = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    assert [example.name for example in EXAMPLES] == ["search.mjs", "search.py", "search.sh"]
    for example in EXAMPLES:
        assert f"\n{example.read_text(encoding='utf-8')}```\n" in page, example.name

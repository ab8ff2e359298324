"""What is installed: every dependency is pinned, audited and listed, and docs/updating.md names what there is.

Advisories come from an HTTP server that answers as OSV does; pip-audit and cyclonedx-py are the real ones.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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


# --- audit and list ------------------------------------------------------------------------------

WEAKNESS = {"id": "PYSEC-0000-1", "summary": "Not so good.", "affected": []}
AnswerTo = Callable[[dict[str, Any]], object]


@contextmanager
def advisories(answer_to: AnswerTo) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that is asked as OSV is; its address, and the names that it was asked for."""
    asked: list[str] = []

    class Osv(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(query["package"]["name"])
            content = json.dumps(answer_to(query)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def weak(*names: str) -> AnswerTo:
    return lambda query: {"vulns": [WEAKNESS]} if query["package"]["name"] in names else {}


def audit(osv: str, tmp_path: Path, *more: str) -> tuple[int, str]:
    """What `make check` and, with `--strict`, `make audit` do, for two pins."""
    (tmp_path / "pins.txt").write_text("typer==1.0\nhttpx==0.28.1\n")
    command = [sys.executable, ROOT / ".ci" / "audit.py", tmp_path / "pins.txt", "--osv", osv, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("more", [(), ("--strict",)])
def test_a_known_weakness_fails_and_none_passes(tmp_path: Path, more: tuple[str, ...]) -> None:
    with advisories(weak("jinja2")) as (osv, asked):
        code, said = audit(osv, tmp_path, *more)
    assert (code, said.splitlines()[-1]) == (0, "No known vulnerabilities found")
    assert asked == ["jinja2", "typer", "httpx"]
    with advisories(weak("jinja2", "httpx")) as (osv, _):
        code, said = audit(osv, tmp_path, *more)
    assert code == 1
    assert re.search(r"^httpx +0\.28\.1 +PYSEC-0000-1", said, re.MULTILINE), said


def test_where_advisories_are_not_reachable_that_is_said(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9/v1/query"
    for more, code in (((), 0), (("--strict",), 1)):
        found, said = audit(nobody, tmp_path, *more)
        assert found == code
        assert re.fullmatch(
            r"audit: advisories not reachable at .*pins\.txt is NOT audited \(ConnectError.*\n", said
        )
    for answer in ({}, {"vulns": []}, [], "x"):  # of what only looks like it
        with advisories(lambda _, answer=answer: answer) as (osv, asked):
            code, said = audit(osv, tmp_path)
        assert (code, "is NOT audited" in said, asked) == (0, True, ["jinja2"])


def test_what_goes_wrong_once_they_are_reachable_is_a_failure(tmp_path: Path) -> None:
    with advisories(lambda query: weak("jinja2")(query) or ["no advisory"]) as (osv, _):
        code, said = audit(osv, tmp_path)
    assert code != 0
    assert "No known vulnerabilities found" not in said


def test_the_list_of_what_is_installed(tmp_path: Path) -> None:
    """`make sbom` in this environment, as it is."""
    to = tmp_path / "sbom.json"
    command = ["make", "-o", "install", "sbom", f"BIN={Path(sys.executable).parent}", f"SBOM={to}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(to.read_bytes())
    assert (told["bomFormat"], told["metadata"]["component"]["name"]) == ("CycloneDX", "askew")
    listed = {canonicalize_name(one["name"]): one for one in told["components"]}
    for needed in NEEDED:
        one = listed[canonicalize_name(needed.name)]
        assert Version(one["version"]) == Version(importlib.metadata.version(needed.name))
        assert one["purl"].startswith(f"pkg:pypi/{canonicalize_name(needed.name)}@")
    assert sum("licenses" in one for one in listed.values()) > len(listed) / 2


def test_check_runs_bandit_and_the_audit() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ncheck:")[2].partition("\n\n")[0]
    assert "/bandit " in recipe
    assert "/python .ci/audit.py constraints.txt\n" in f"{recipe}\n"

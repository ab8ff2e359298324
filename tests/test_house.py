"""The shape of the house itself."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "platform").rglob("*.py"))


def test_platform_is_no_package() -> None:
    # it would shadow the standard library's `platform`, and Ray jobs then hang PENDING
    assert not (ROOT / "platform" / "__init__.py").exists()
    import platform

    assert platform.python_version()


def test_one_vendor_one_file() -> None:
    for vendor, home in {"faiss": "ann.py", "mlflow": "registry.py"}.items():
        users = {
            p.name for p in SOURCES if re.search(rf"^\s*(import|from) {vendor}\b", p.read_text(), re.MULTILINE)
        }
        assert users == {home}


def test_nothing_is_unpickled() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"\b(import pickle|pickle\.load|allow_pickle=True|weights_only=False)\b", text), path
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, path


def test_ci_is_what_a_person_runs() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make check test"]


def test_constraints_name_no_host_and_no_path() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line), line

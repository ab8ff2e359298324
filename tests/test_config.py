import json
import subprocess
import sys
from pathlib import Path

import pytest

from askew import config
from askew.errors import ConfigError


class Inner(config.Settings):
    width: int = 4


class Outer(config.Settings):
    name: str
    inner: Inner = Inner()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_a_file_with_overrides(tmp_path: Path) -> None:
    settings = config.load(Outer, written(tmp_path, "name: a\n"), ["inner.width=8", "name=b=c"])
    assert settings == Outer(name="b=c", inner=Inner(width=8))


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("name: a\nnmae: b\n", [], "nmae"),
        ("inner: {}\n", [], "name: Field required"),
        ("name: [\n", [], "YAML"),
        ("- 1\n", [], "list"),
        ("name: a\n", ["inner.width=wide"], "inner.width"),
        ("name: a\n", ["width"], "'width'"),
        ("name: a\n", ["name.x=1"], "'name.x=1'"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.load(Outer, written(tmp_path, text), overrides)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        config.load(Outer, tmp_path / "absent.yaml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().width = 3  # type: ignore[misc]


SCRIPT = """
from askew import config
from askew.errors import DataError
class S(config.Settings):
    n: int
def stage(s):
    if s.n < 0:
        raise DataError("n of at least 0", str(s.n), "raise it")
    return {"n": s.n}
config.main(S, stage, "A stage.")
"""


def test_a_script_ends_with_its_result_or_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, "n: 1\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False
        )

    good = run(str(path), "n=2")
    assert good.returncode == 0
    assert json.loads(good.stdout.splitlines()[-1].removeprefix(config.RESULT)) == {"n": 2}
    bad = run(str(path), "n=-1")
    assert bad.returncode == 2
    assert bad.stderr == "askew: error: wanted n of at least 0; found -1; raise it\n"
    assert "usage" in run().stdout

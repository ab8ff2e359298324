"""Settings from files and from what is set beside them: they fit, or are refused by name."""

import contextlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from askew import building, config, pipeline, serving, status, updating  # noqa: F401  # whose settings there are
from askew.errors import ConfigError
from askew.recipes import TrainSettings

RECIPES = sorted((Path(__file__).parent.parent / "jobs").glob("train.*.yaml"))


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


class Loose(config.Settings):
    values: dict[str, Any]


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: 2024-13-45", "month must be"), ("name: !!int ''", "string index"),
        ("name: !!timestamp x", "NoneType"),
        ("[" * 5000, "nested more than 50 deep"), ("name: " + "1" * 5000, "4300 digits"),
        ("name: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("values: &a {b: *a}", "nested more than 50"), (LAUGHS, "more than 100,000 values"),
        ("a: " + "x" * 1_000_001, "1,000,004 characters, more than 1,000,000"),
        ("name: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
    ids=["date", "int", "time", "brackets", "digits", "deep", "itself", "laughs", "large", "python"],
)  # fmt: skip
def test_odd_yaml_is_refused_in_a_file_and_beside_it(tmp_path: Path, text: str, says: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match=says):
        config.load(Loose, written(tmp_path, text))
    if "\n" not in text and ": " in text:
        with pytest.raises(ConfigError):
            config.load(Loose, written(tmp_path, ""), ["values.x=" + text.partition(": ")[2]])
    assert time.process_time() - started < 5


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
def test_numbers_are_finite(tmp_path: Path, number: str) -> None:
    file, places = RECIPES[0], ["triplets=t", "root=r"]
    name = next(iter(config.load(TrainSettings, file, places).stages))
    with pytest.raises(ConfigError, match="learning_rate: Input should be a finite number"):
        config.load(TrainSettings, file, [*places, f"stages.{name}.learning_rate={number}"])


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.just(2**70), st.floats(), st.text(max_size=4), st.dates(),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


def kinds(kind: type[config.Settings] = config.Settings) -> list[type[config.Settings]]:
    """All settings that there are."""
    return [one for child in kind.__subclasses__() for one in [child, *kinds(child)] if "askew" in one.__module__]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=15)
def test_any_values_are_settings_that_come_back_as_they_are_or_refused(
    kind: type[config.Settings], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = st.sampled_from([*kind.model_fields, "other", ""])
    values = data.draw(st.dictionaries(names, ODD, max_size=4))
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    try:
        found = config.load(kind, path)
    except ConfigError:
        return
    told = found.model_dump_json(by_alias=True)
    assert kind.model_validate_json(told).model_dump_json(by_alias=True) == told


@given(st.text(max_size=40) | st.binary(max_size=40).map(lambda data: data.decode("latin-1")))
def test_any_text_is_settings_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for given_ in ([], [f"inner.width={text}"], [text]):
        with contextlib.suppress(ConfigError):
            config.load(Outer, path if not given_ else written(path.parent, "name: a"), given_)

"""Moving the alias, by the stage and by the command, against a real MLflow."""

from pathlib import Path

import pytest
from tests.test_registry import make
from typer.testing import CliRunner

from askew.cli import app
from askew.promotion import PromoteSettings, promote
from askew.registry import CHALLENGER, CHAMPION, Registry, Version
from askew.releases import BY, FORCE


@pytest.fixture
def versions(mlflow_uri: str, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Registry, list[Version]]:
    registry, name = Registry(mlflow_uri), f"promoted-{abs(hash(request.node.name)) % 10**9}"
    run = registry.start_run("promotion", name, {}, {})
    return registry, [registry.register(name, make(tmp_path, f"{n}"), run, {}) for n in range(2)]


def test_an_alias_is_on_the_version_that_it_was_moved_to(versions: tuple[Registry, list[Version]]) -> None:
    registry, [one, two] = versions
    assert registry.aliased(one.name, CHAMPION) is None
    assert registry.aliased("no-such-model", CHAMPION) is None
    for version in (one, two):
        promote(PromoteSettings(model=one.name, version=version.version, tracking_uri=registry.uri))
        found = registry.aliased(one.name, CHAMPION)
        assert found is not None
        assert (found.version, found.source) == (version.version, version.source)
        assert found.tags[BY]
    assert registry.aliased(one.name, CHALLENGER) is None


def test_the_command_moves_it_and_force_is_for_once(versions: tuple[Registry, list[Version]]) -> None:
    registry, [one, two] = versions
    where = ["--tracking-uri", registry.uri]
    done = CliRunner().invoke(app, ["promote", one.name, "2", "--force", *where])
    assert (done.exit_code, done.output) == (0, f"{one.name} version 2 bears champion\n")
    found = registry.aliased(one.name, CHAMPION)
    assert found is not None
    assert (found.version, found.tags[FORCE]) == ("2", "1")
    done = CliRunner().invoke(app, ["promote", one.name, CHAMPION, "--alias", "challenger", *where])
    assert done.exit_code == 0
    found = registry.aliased(two.name, CHALLENGER)
    assert found is not None
    assert (found.version, found.tags[FORCE]) == ("2", "")


def test_a_version_that_is_not_there_is_said_without_a_traceback(versions: tuple[Registry, list[Version]]) -> None:
    registry, [one, _] = versions
    done = CliRunner().invoke(app, ["promote", one.name, "9", "--tracking-uri", registry.uri])
    assert done.exit_code == 2
    assert f"askew: error: wanted version or alias '9' of model '{one.name}'; found versions 1, 2;" in done.output
    done = CliRunner().invoke(app, ["promote", one.name, "1", "--tracking-uri", "http://127.0.0.1:9"])
    assert done.exit_code == 2
    assert "wanted an MLflow server at 'http://127.0.0.1:9'" in done.output


def test_a_description_is_what_it_was_set_to(versions: tuple[Registry, list[Version]]) -> None:
    registry, [one, _] = versions
    registry.describe(one, "**search**: live")
    assert registry._client.get_model_version(one.name, "1").description == "**search**: live"

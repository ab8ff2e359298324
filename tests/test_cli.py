"""The command line: what a person meets on the first day, each in one line, through the real command."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tests.fakes import FakeSearcher, serving
from typer.testing import CliRunner

from askew import ports, stages
from askew.cli import app
from askew.keys import Keys, add

ROOT = Path(__file__).parent.parent
RUN = CliRunner()
NOBODY = "http://127.0.0.1:9"
COMMANDS = (*stages.STAGES, "serve", "search", "doctor", "status", "keys", "backup", "restore", "verify", "bench")


def says(*arguments: str) -> str:
    """Run a command, which must end with 2 and one line; returns the line."""
    done = RUN.invoke(app, list(arguments))
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("askew: error: ")]
    assert len(lines) == 1, done.output
    assert "Traceback" not in done.output
    assert lines[0].startswith("askew: error: wanted ")
    assert lines[0].count("; ") >= 2
    return lines[0]


def askew(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does."""
    return subprocess.run(
        [sys.executable, "-m", "askew.cli", *arguments], capture_output=True, text=True, check=False, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform"), **environment},
    )  # fmt: skip


# --- the command itself --------------------------------------------------------------------------


def test_the_command_imports_nothing_heavy() -> None:
    script = "import sys, askew.cli; print(*sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {
        "ray",
        "torch",
        "mlflow",
        "numpy",
        "pyarrow",
        "pandas",
        "faiss",
        "transformers",
        "fastapi",
    }
    assert "typer" in loaded


def test_help_names_all_commands_and_each_has_examples() -> None:
    shown = RUN.invoke(app, ["--help"]).output
    for command in COMMANDS:
        assert f" {command} " in shown
        own = RUN.invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
        assert own.exit_code == 0
        assert f"askew {command}" in own.output.partition("Examples:")[2], command


def test_the_version() -> None:
    from askew import __version__

    assert RUN.invoke(app, ["--version"]).output == f"askew {__version__}\n"


def test_commands_are_completed() -> None:
    script = "from askew.cli import app; app(prog_name='askew')"
    environment = {"_ASKEW_COMPLETE": "complete_bash", "COMP_WORDS": "askew pr", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform"), **environment},
    )  # fmt: skip
    assert done.stdout.split() == ["prepare", "promote"]


def test_an_error_is_a_line_and_with_debug_a_traceback() -> None:
    quiet, loud = (askew("train", "no.yaml", *more) for more in ((), ("--debug",)))
    assert (quiet.returncode, quiet.stdout) == (2, "")
    assert quiet.stderr == "askew: error: wanted a settings file of train; found none at no.yaml; check the path\n"
    assert "Traceback" in loud.stderr
    assert "askew.errors.ConfigError" in loud.stderr


# --- the first day -------------------------------------------------------------------------------


def test_a_settings_file_that_is_missing(tmp_path: Path) -> None:
    assert f"found none at {tmp_path}/mine.yaml; check the path" in says("prepare", f"{tmp_path}/mine.yaml")
    assert "take one out" in says("prepare", "a.yaml", "b.yaml")
    assert f"found none at {tmp_path}/mine.yaml" in says("serve", f"{tmp_path}/mine.yaml")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("prepare", "data=/d", "root=/r", "image_sise=64"), "image_sise: no such setting (is it image_size?)"),
        (("train", "triplets=/t", "root=/r", "towers.dmi=64"), "towers.dmi: no such setting (is it dim?)"),
        (
            ("index", "triplets=/t", "root=/r", "recal_target=1"),
            "recal_target: no such setting (is it recall_target?)",
        ),
        (("serve", "--set", "num_shrads=3"), "num_shrads: no such setting (is it num_shards?)"),
        (("serve", "--set", "switch.gates.recal=3"), "switch.gates.recal: no such setting (is it recall?)"),
        (("prepare", "data=/d"), "root: Field required"),
    ],
)
def test_a_setting_that_is_misspelt_or_missing(arguments: tuple[str, ...], found: str) -> None:
    assert f"found {found}; mend " in says(*arguments)


def test_no_data(tmp_path: Path) -> None:
    line = says("prepare", f"data={tmp_path}/absent", f"root={tmp_path}/root")
    assert line == f"askew: error: wanted a catalogue's folder; found no folder {tmp_path}/absent; check the path"


def test_a_wrong_column(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,name\na,mug\n")
    (tmp_path / "queries.csv").write_text("query_id,query\nq,mug\n")
    (tmp_path / "judgments.csv").write_text("query_id,item_id,grade\nq,a,1\n")
    line = says("prepare", f"data={tmp_path}", f"root={tmp_path}/root")
    assert "title" in line
    assert "items.csv" in line


def test_a_gpu_that_is_not_there(cluster: None, triplets_folder: Path, tmp_path: Path) -> None:
    places = [f"triplets={triplets_folder}", f"root={tmp_path}", "towers.image_size=32"]
    line = says("train", "jobs/train.demo.yaml", *places, "use_gpu=true")
    assert (
        "wanted 2 GPUs, one for each worker; found 0 in the cluster; lower num_workers, or use_gpu=false" in line
    )


def test_mlflow_that_is_not_up(triplets_folder: Path, tmp_path: Path) -> None:
    line = says("index", f"triplets={triplets_folder}", f"root={tmp_path}", f"tracking_uri={NOBODY}")
    assert f"wanted an MLflow server at '{NOBODY}'; found ConnectError" in line
    assert "start one, or set MLFLOW_TRACKING_URI" in line


def test_an_endpoint_that_is_not_up() -> None:
    assert f"wanted an askew endpoint at {NOBODY}; found ConnectError" in says(
        "search", "mug", "--endpoint", NOBODY
    )
    done = RUN.invoke(
        app, ["status", "--address", NOBODY, "--tracking-uri", NOBODY, "--endpoint", NOBODY, "--json"]
    )
    assert done.exit_code == 0
    assert json.loads(done.stdout)["endpoint"]["do"].startswith("start it")


def test_a_cluster_that_is_not_up() -> None:
    for arguments in (("serve",), ("prepare", "data=/d", "root=/r")):
        line = says(*arguments, "--address", NOBODY)
        assert f"wanted a Ray cluster's dashboard at {NOBODY}; found ConnectError" in line


def test_a_filter_that_is_none() -> None:
    assert "wanted a filter of JSON; found '{'" in says("search", "mug", "--filter", "{")
    assert "found '3'" in says("search", "mug", "--filter", "3")


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """By a stranger, whom the doctor names, and `serve` refuses to deploy beside."""

    class Dashboard(BaseHTTPRequestHandler):
        """A cluster's dashboard that answers that nothing is served; it is the stranger, too."""

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"applications": {}, "proxies": {}}')

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        Thread(target=server.serve_forever, args=(0.05,)).start()
        taken = int(server.server_address[1])
        config = (ROOT / "serve_configs" / "search.yaml").read_text()
        (tmp_path / "serve.yaml").write_text(config.replace("port: 8000", f"port: {taken}"))
        try:
            line = says("serve", f"{tmp_path}/serve.yaml", "--address", f"http://127.0.0.1:{taken}")
        finally:
            server.shutdown()
    assert f"wanted port {taken} free for the search endpoint; found process {os.getpid()}" in line


# --- what works ----------------------------------------------------------------------------------


def test_a_stage_runs_here_and_json_is_all_that_it_prints(
    cluster: None, drawn_folder: Path, tmp_path: Path
) -> None:
    command = ("prepare", f"data={drawn_folder}", f"root={tmp_path}", "image_size=16")
    first = RUN.invoke(app, [*command, "--json"])
    assert first.exit_code == 0, first.output
    [line] = first.stdout.splitlines()
    result = json.loads(line)
    assert (Path(result["artifact"]).parent, result["skipped"]) == (tmp_path, False)
    assert "prepare: " in first.stderr  # what the stage says, for whoever looks
    again = RUN.invoke(app, list(command))
    assert "done before" in again.stdout
    assert result["artifact"] in again.stdout


def test_a_settings_file_must_travel_with_a_job(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("image_size: 16\n")
    line = says("prepare", str(mine), "data=/d", "root=/r", "--address", NOBODY)
    assert f"which travels with the job; found {mine}; copy it there" in line


def test_benches_are_listed_and_run_with_their_options(tmp_path: Path) -> None:
    listed = RUN.invoke(app, ["bench"]).stdout
    assert "index " in listed
    assert "wanted a bench: chaos, " in says("bench", "nothing")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "runtime_env.yaml").touch()
    (tmp_path / "platform" / "askew").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    told = '"""Tell."""\nimport sys\nif __name__ == "__main__":\n    print(sys.argv[1:])\n    sys.exit(7)\n'
    (tmp_path / "bench" / "told.py").write_text(told)
    done = askew("bench", "told", "--quick", "--help", "x", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("['--quick', '--help', 'x']\n", 7)


def test_where_there_is_no_checkout_it_is_said(tmp_path: Path) -> None:
    """The package alone, as it is installed from a wheel."""
    installed = tmp_path / "site" / "askew"
    installed.parent.mkdir()
    installed.symlink_to(ROOT / "platform" / "askew")
    for command in ("bench", "prepare"):
        done = askew(command, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
        assert done.returncode == 2
        assert f"wanted a checkout of askew, which has jobs/ and bench/; found none at {tmp_path}" in done.stderr


def test_a_search_shows_the_key_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    file = tmp_path / "keys.yaml"
    made = RUN.invoke(app, ["keys", "add", "shop", "--scope", "search", "--file", str(file)])
    assert made.exit_code == 0, made.output
    with serving(FakeSearcher(), keys=Keys(file, print)) as url:
        assert "found 401 this endpoint wants a key" in says("search", "mug", "--endpoint", url)
        monkeypatch.setenv("ASKEW_API_KEY", made.stdout.strip())
        found = RUN.invoke(app, ["search", "mug", "--endpoint", url, "--json"])
        assert json.loads(found.stdout)["hits"], found.output


def test_status_shows_its_key_to_the_endpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    key, sent = add(tmp_path / "keys.yaml", "shop", ["search"]), list[str]()

    class Listening(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(str(self.headers))
            self.send_error(404)

        def log_message(self, *what: object) -> None:
            pass

    wanted = Keys(tmp_path / "keys.yaml", print)
    with ThreadingHTTPServer(("127.0.0.1", 0), Listening) as other, serving(FakeSearcher(), keys=wanted) as url:
        Thread(target=other.serve_forever, daemon=True).start()
        elsewhere = f"http://127.0.0.1:{other.server_port}"
        places = ["status", "--address", elsewhere, "--tracking-uri", elsewhere, "--endpoint"]
        without = RUN.invoke(app, [*places, url])
        told = json.loads(RUN.invoke(app, [*places, url, "--json"]).stdout)["endpoint"]
        monkeypatch.setenv("ASKEW_API_KEY", key)
        found = json.loads(RUN.invoke(app, [*places, url, "--json"]).stdout)["endpoint"]
        other.shutdown()
    assert (told["ready"], told["release"]) == (True, None)
    assert told["withheld"] == "this endpoint wants a key, and none was sent"
    assert "its release is not told: this endpoint wants a key, and none was sent" in without.stdout
    assert found["release"]["model"]["version"] == "3"
    assert len(sent) >= 9
    assert not [headers for headers in sent if key in headers]


def test_ports_are_the_demos() -> None:
    assert ports.Ports().url("http") in RUN.invoke(app, ["search", "--help"], env={"TERMINAL_WIDTH": "200"}).output

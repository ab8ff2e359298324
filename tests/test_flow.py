"""From a catalogue to a search answered: `demo` over a tiny catalogue, with real Ray jobs, MLflow, FAISS and HTTP.

The first run is killed in the middle of the training; a second one goes on from there. All that follows asks
the endpoint that it leaves up.
"""

import base64
import functools
import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import psutil
import pytest
from tests.fakes import measured

from askew import demo, keys, local, tables
from askew import ports as ports_
from askew.errors import StageError
from askew.metrics import MEASURES
from askew.models import Model
from askew.pipeline import KEYS
from askew.promotion import PromoteSettings, promote
from askew.registry import Registry

ROOT = Path(__file__).parent.parent
TRAIN = (
    "stages.joint.steps=60", "batch_size=32", "checkpoint_every=10", "towers.dim=32", "towers.text.width=32",
    "towers.text.heads=2", "bf16=false",
)  # fmt: skip
PATIENCE_S = 240


def until(true: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + patience_s
    while not (found := true()):
        assert time.monotonic() < deadline, f"no {what} after {patience_s:.0f} s"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def data(drawn_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue as a shop would bring it: a folder outside the demo's."""
    return Path(shutil.copytree(drawn_folder, tmp_path_factory.mktemp("shop") / "catalogue"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("demo")
    yield folder
    local.stop(folder)


@pytest.fixture(scope="module")
def ports() -> local.Ports:
    return local.Ports(**dict(zip(local.PURPOSES, local.free_ports(4), strict=True)))


@pytest.fixture(scope="module")
def killed(home: Path, ports: local.Ports, data: Path) -> None:
    """A first run, killed without a chance to tidy up while the training is under way."""
    options = [f"--{name}-port={port}" for name, port in ports.model_dump().items()]
    options += ["--home", str(home), "--data", str(data), *(f"--train={change}" for change in TRAIN)]
    command = [sys.executable, "-m", "askew.demo", "up", *options]
    with (home / "first.log").open("w") as log:
        first = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    training = home / "logs" / "train.log"

    def under_way() -> bool:
        assert first.poll() is None, (home / "first.log").read_text()
        return training.exists() and "askew: train step" in training.read_text(errors="replace")

    try:
        until(under_way, "training step")
    finally:
        first.kill()
        first.wait()


@pytest.fixture(scope="module")
def report(killed: None, home: Path, ports: local.Ports, data: Path) -> dict[str, Any]:
    """What a second run reports."""
    demo.run(home, ports, data, TRAIN)
    return dict(json.loads((home / "report.json").read_text()))


@pytest.fixture(scope="module")
def stack(report: dict[str, Any], home: Path) -> local.Stack:
    found = local.find(home)
    assert found is not None
    return found


def search(stack: local.Stack, query: str, k: int = 5) -> httpx.Response:
    return httpx.post(f"{stack.endpoint}/search", json={"query": query, "k": k}, timeout=30)


def test_a_killed_run_goes_on_where_it_was(report: dict[str, Any], stack: local.Stack) -> None:
    jobs = httpx.get(f"{stack.dashboard}/api/jobs/").json()
    names = [re.sub(r"-\w+-\d+$", "", job["submission_id"]) for job in jobs if job["submission_id"]]
    assert sorted(names) == ["evaluate", "index", "prepare", "promote", "train"]  # each once
    assert {job["status"] for job in jobs if job["submission_id"]} == {"SUCCEEDED"}
    assert report["stages"]["prepare"]["skipped"]
    assert not report["stages"]["index"]["skipped"]


def test_the_report(report: dict[str, Any], data: Path) -> None:
    stages = report["stages"]
    assert set(stages) == {"prepare", "train", "register", "index", "evaluate", "promote", "deploy"}
    for name, stage in stages.items():
        assert stage["seconds"] >= 0, name
        assert stage["rows"] > 0, name
    assert stages["train"]["rows"] == 60 * 32
    assert set(report["metrics"]) == {"text", "image", "fused", "shuffled", "missing", "bm25", "hybrid"}
    for values in report["metrics"].values():
        assert set(values) == set(MEASURES)
        assert all(0 <= value <= 1 for value in values.values())
    assert report["metrics"]["fused"]["nDCG@10"] > 0.1  # a tiny model, but it learnt: chance is about 0.03
    gains = report["evaluation"]["modality"]["gains"]
    assert (
        gains["image"]["low"] > 0 >= gains["shuffled"]["low"]
    )  # it is the photo that brings it: another's does not
    assert gains["shuffled"]["difference"] < 0.02
    assert report["cluster"] == {"nodes": 1, "workers": 2}
    assert report["model"] == {"name": "askew-demo", "version": "1"}
    assert report["index"] == {"shards": 2, "segments": 4, "items": 300}
    assert report["data"] == str(data)
    assert len(report["searches"]) == 4


def test_a_search_is_the_exact_one_over_the_whole_catalogue(stack: local.Stack) -> None:
    root = stack.home / "artifacts"
    [model], [triplets] = root.glob("model-*"), root.glob("triplets-*")
    towers, vectors, ids = Model.load(model), [], []
    columns = ["item_id", "text", "pixels", "has_image"]
    for batch in tables.batches(tables.parts(triplets / "items"), columns, 100):
        photos = tables.pixels(batch["pixels"], towers.image_size)
        has_image = batch["has_image"].to_numpy(zero_copy_only=False)
        vectors.append(towers.items(batch["text"].to_pylist(), photos, has_image)["fused"])
        ids += batch["item_id"].to_pylist()
    for query in ("red striped mug", "cushion", "etwas völlig anderes", "🙂"):
        answer = search(stack, query, k=20).json()
        scores = np.concatenate(vectors) @ towers.queries([query])[0]
        assert [h["score"] for h in answer["hits"]] == pytest.approx(np.sort(scores)[::-1][:20].tolist(), abs=1e-4)
        for hit in answer["hits"]:
            assert hit["score"] == pytest.approx(scores[ids.index(hit["item_id"])], abs=1e-4)
        assert answer["model"] == {"name": "askew-demo", "version": "1"}
        whole = {"shards": 2, "answered": 2, "missing": 0.0}
        assert (answer["coverage"], answer["degraded"]) == (whole, False)


def test_an_answer_carries_its_request_id_through_the_proxy(stack: local.Stack) -> None:
    answer = search(stack, "mug")
    assert answer.headers.get_list("x-request-id") == [answer.json()["request_id"]]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"query":', {}, 400),
        (b'{"query": "\xff"}', {}, 400),
        (b'{"query": ""}', {}, 422),
        (b'{"query": "mug", "k": 0}', {}, 422),
        (b'{"query": "' + b"m" * 70_000 + b'"}', {}, 413),
        (b"[" * 60_000, {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
    ],
)
def test_bad_input_is_refused_through_the_proxy(
    stack: local.Stack, body: bytes, headers: dict[str, str], status: int
) -> None:
    answer = httpx.post(
        f"{stack.endpoint}/search", content=body, headers={"content-type": "application/json"} | headers
    )
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"code", "message", "param", "hint"}


def test_an_item_is_upserted_found_explained_and_deleted(stack: local.Stack) -> None:
    [photo] = [
        httpx.get(f"{stack.endpoint}/items/{hit['item_id']}/image").content
        for hit in search(stack, "red striped mug", k=1).json()["hits"]
    ]
    title = "Zebra lamp of hammered brass"
    item = {
        "item_id": "new 1/a",
        "title": title,
        "fields": {"price": 3},
        "image": base64.b64encode(photo).decode(),
    }
    written = httpx.post(
        f"{stack.endpoint}/items:upsert", json={"items": [item, {"item_id": "new-2", "title": ""}]}, timeout=30
    ).json()
    assert (written["items"], [one["reason"] for one in written["refused"]]) == (1, ["no_text"])

    def shown(**how: Any) -> dict[str, Any]:
        body = {"query": title, "k": 20, "explain": True, "filter": {"price": 3}, **how}
        answer = httpx.post(f"{stack.endpoint}/search", json=body, timeout=30).json()
        return {hit["item_id"]: hit for hit in answer["hits"]}

    hit = until(lambda: shown().get("new 1/a"), "upserted item", 5)
    assert (hit["title"], hit["fields"]["price"]) == (title, 3)
    assert hit["explanation"]["fused"] == pytest.approx(hit["score"], abs=1e-3)
    assert hit["explanation"]["without_image"] != pytest.approx(hit["score"], abs=1e-3)
    assert httpx.get(f"{stack.endpoint}/items/{quote('new 1/a')}/image").content == photo
    httpx.post(f"{stack.endpoint}/items:delete", json={"item_ids": ["new 1/a"]}, timeout=30).raise_for_status()
    until(lambda: "new 1/a" not in shown(), "deleted item gone", 5)
    assert httpx.get(f"{stack.endpoint}/items/{quote('new 1/a')}").status_code == 404


def test_what_is_measured_can_be_scraped(stack: local.Stack) -> None:
    [listed] = json.loads((stack.temporary / "prom_metrics_service_discovery.json").read_bytes())
    unseen = {"HEDGED", "MISSED", "PROXY_RESTARTS"}  # there is nothing of these yet
    names = {*itertools.chain(*(of for name, of in measured().items() if name not in unseen))}
    alerts = (ROOT / "serve_configs" / "alerts.yaml").read_text(encoding="utf-8")
    name, routes = re.search(r'(ray_serve_\w+){deployment="ingress",route=~"([^"]+)"}', alerts).groups()

    def scraped() -> bool:
        pages = ""
        for target in listed["targets"]:
            with suppress(httpx.ConnectError):  # of some of Ray's own parts, which may not be there
                pages += httpx.get(f"http://{target}/metrics", timeout=30).text
        serves = re.findall(rf'^{name}{{.*deployment="ingress",.*route="([^"]*)"', pages, re.MULTILINE)
        found = {*re.findall(r"^(\w+){", pages, re.MULTILINE)}
        return names <= found and "/search" in [route for route in serves if re.fullmatch(routes, route)]

    until(scraped, "metrics of the endpoint", 60)


def test_clients_that_hang_up_take_nothing_with_them(stack: local.Stack) -> None:
    body = json.dumps({"query": "mug of a client that hangs up"}).encode()
    lines = ["POST /search HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
    head = "\r\n".join([*lines, "", ""])
    for sent in (head.encode() + body, head.encode() + body[:5]) * 20:
        with socket.create_connection((local.HOST, stack.ports.http)) as connection:
            connection.sendall(sent)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: search(stack, f"mug {n}"), range(40)))
    assert {answer.status_code for answer in answers} == {200}


def test_mlflow_holds_the_version_its_alias_and_numbers(stack: local.Stack) -> None:
    api, name = f"{stack.mlflow}/api/2.0/mlflow", {"name": "askew-demo"}
    model = httpx.get(f"{api}/registered-models/get", params=name).json()["registered_model"]
    assert {a["alias"]: a["version"] for a in model["aliases"]} == {"champion": "1", "challenger": "1"}
    version = httpx.get(f"{api}/model-versions/get", params=name | {"version": "1"}).json()["model_version"]
    tags = {tag["key"]: tag["value"] for tag in version["tags"]}
    assert Path(tags["askew.index"]).is_dir()
    run = httpx.get(f"{api}/runs/get", params={"run_id": version["run_id"]}).json()["run"]
    metrics = {metric["key"] for metric in run["data"]["metrics"]}
    assert metrics >= {"train/loss", "valid/nDCG_at_10"}
    assert run["info"]["status"] == "FINISHED"


def test_run_again_it_skips_what_is_done(stack: local.Stack, report: dict[str, Any], data: Path) -> None:
    again = demo.run(stack.home, stack.ports, data, TRAIN)
    assert all(stage["skipped"] for stage in again["stages"].values())
    assert again["metrics"] == report["metrics"]
    assert len(httpx.get(f"{stack.dashboard}/api/jobs/").json()) == len(report["stages"]) - 2  # no new job


def test_the_alias_switches_a_running_endpoint_once_the_gates_are_passed(stack: local.Stack) -> None:
    """A second version of the same weights has no index yet, and was not evaluated."""
    registry, seen, failed, over = Registry(stack.mlflow), set[str](), list[str](), threading.Event()

    def ask() -> None:
        while not over.is_set():
            answer = search(stack, "red striped mug")
            if answer.status_code == 200:
                seen.add(answer.json()["model"]["version"])
            else:
                failed.append(answer.text)

    def live() -> dict[str, Any]:
        return dict(httpx.get(f"{stack.endpoint}/release", timeout=30).json())

    first = registry.resolve("askew-demo", "1")
    model = registry.download(first, stack.home / "again")
    second = registry.register("askew-demo", model, registry.start_run("again", "again", {}, {}), {})
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            registry.promote(second)
            refused = until(
                lambda: (live()["candidate"] or {}).get("state") == "refused" and live(), "a refusal", 90
            )
            assert refused["candidate"]["reasons"][0].startswith("quality: wanted")
            assert registry.resolve("askew-demo", "2").index == first.index  # built by a job meanwhile
            promote(PromoteSettings(model="askew-demo", version="2", tracking_uri=stack.mlflow, force=True))
            until(lambda: live()["model"]["version"] == "2", "version 2 live", 60)
            registry.promote(first)
            until(lambda: live()["model"]["version"] == "1", "version 1 live again", 10)
        finally:
            over.set()
        for one in asking:
            one.result()
    assert (failed, seen) == ([], {"1", "2"})

    def page(version: str) -> str:
        return registry.resolve("askew-demo", version).description

    until(lambda: "**Endpoint search**: live since" in page("1"), "what is live on its page", 10)
    until(lambda: "**Endpoint search**: not live since" in page("2"), "what is not on its page", 10)


def test_the_pipeline_is_one_job_and_run_again_does_nothing_twice(stack: local.Stack, data: Path) -> None:
    """Its triplets are those that the demo's own job prepared; all else it makes itself."""
    places = [f"data={data}", f"root={stack.home / 'artifacts'}", "model=askew-pipeline"]
    small = [*(f"train.{change}" for change in TRAIN), "train.stages.joint.steps=4", "train.num_workers=1"]
    command = ["python", "jobs/pipeline.py", "jobs/pipeline.yaml", *places, *small, "evaluate.modality=false"]
    first, second = (local.submit(stack, "pipeline", "0" * 12, command, ROOT) for _ in range(2))
    done = [name for name, stage in first["stages"].items() if not stage["skipped"]]
    assert done == ["train", "index", "evaluate", "promote"]
    assert all(stage["skipped"] for stage in second["stages"].values())
    assert (second["version"], second["keys"]) == ("1", first["keys"])
    version = Registry(stack.mlflow).resolve("askew-pipeline", "challenger")
    assert (version.version, json.loads(version.tags[KEYS])) == ("1", first["keys"])


def askew(stack: local.Stack, *arguments: str) -> subprocess.Popen[str]:
    """Start the command line, as a person does, who can interrupt it even where the tests cannot be."""
    return subprocess.Popen(
        [sys.executable, "-m", "askew.cli", *arguments], text=True, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=stack.environment | {"PYTHONPATH": str(ROOT / "platform")},
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def told(stack: local.Stack, *arguments: str) -> Any:
    """What a command prints as JSON, which must be all that it prints."""
    process = askew(stack, *arguments, "--json")
    out, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode in (0, 1), errors
    [line] = out.splitlines()
    return json.loads(line)


def test_the_command_line_looks_at_what_runs(stack: local.Stack, data: Path) -> None:
    places = ["--address", stack.dashboard, "--tracking-uri", stack.mlflow, "--endpoint", stack.endpoint]
    status: dict[str, Any] = {}

    def whole() -> bool:  # a part that has no time for it is told as one that does not answer
        status.update(told(stack, "status", *places))
        return not [name for name, part in status.items() if "do" in part]

    until(whole, "status of all parts", 60)
    assert (status["cluster"]["nodes"], status["cluster"]["resources"]["CPU"]["total"] >= 4) == (1, True)
    assert status["cluster"]["resources"]["memory"]["free"] > 0
    states = {one["state"] for one in status["jobs"]["latest"]}  # one may have been stopped by a test before
    assert states - {"STOPPED"} == {"SUCCEEDED"}
    [model] = [one for one in status["models"]["models"] if one["name"] == "askew-demo"]
    assert model == {"name": "askew-demo", "newest": "2", "aliases": {"champion": "1", "challenger": "1"}}
    application = status["serve"]["applications"]["search"]
    assert application["state"] == "RUNNING"
    assert application["deployments"]["shard-1"]["replicas"] == {"RUNNING": 1}
    assert (status["endpoint"]["ready"], status["endpoint"]["release"]["model"]["version"]) == (True, "1")
    ports = [f"--{name}-port={port}" for name, port in stack.ports.model_dump().items()]
    checks = told(stack, "doctor", *places, *ports, "--data", str(data))["checks"]
    found = {one["name"]: (one["state"], one["found"]) for one in checks}
    assert found[f"port {stack.ports.http}"] == ("ok", "askew's endpoint answers there")
    assert found[f"port {stack.ports.mlflow}"] == ("ok", "MLflow answers there")
    assert found[f"port {stack.ports.gcs}"][0] == "ok"
    assert found["endpoint"] == ("ok", "askew-demo version 1 is live")
    names = (
        "ray",
        "torch",
        "mlflow",
        "faiss",
        "pyarrow",
        "cluster",
        "MLflow",
        "data",
        f"port {stack.ports.dashboard}",
    )
    assert {name: found[name][0] for name in names} == dict.fromkeys(names, "ok"), found


def test_the_command_line_searches_and_serves(stack: local.Stack) -> None:
    hits = told(stack, "search", "red striped mug", "-k", "3", "--endpoint", stack.endpoint)["hits"]
    assert [hit["item_id"] for hit in hits] == [
        hit["item_id"] for hit in search(stack, "red striped mug", k=3).json()["hits"]
    ]
    config = str(stack.home / "serve.yaml")  # what runs already
    assert told(stack, "serve", config, "--address", stack.dashboard) == {"endpoint": stack.endpoint}


def test_the_command_line_runs_a_stage_as_a_job_and_may_leave_it(
    stack: local.Stack, data: Path, tmp_path: Path
) -> None:
    where = ["prepare", f"data={data}", "--address", stack.dashboard]
    result = told(stack, *where, f"root={stack.home / 'artifacts'}")
    assert (Path(result["artifact"]).parent, result["skipped"]) == (stack.home / "artifacts", True)
    left = askew(stack, *where, f"root={tmp_path}", "image_size=16")
    assert left.stderr is not None
    next(line for line in left.stderr if line.startswith("prepare: "))
    left.send_signal(signal.SIGINT)
    _, errors = left.communicate(timeout=30)
    assert left.returncode == 130
    [job] = re.findall(rf"ray job stop --address {stack.dashboard} (prepare-\S+)", errors)
    status = httpx.get(f"{stack.dashboard}/api/jobs/{job}", timeout=30).json()["status"]
    assert status in ("RUNNING", "SUCCEEDED")
    httpx.post(f"{stack.dashboard}/api/jobs/{job}/stop", timeout=30).raise_for_status()


def test_a_stage_that_fails_says_why_and_leaves_nothing(stack: local.Stack, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    command = ["python", "jobs/prepare.py", "jobs/prepare.yaml", f"data={tmp_path}/data", f"root={tmp_path}/root"]
    with pytest.raises(StageError) as caught:
        local.submit(stack, "prepare", "0" * 12, command, ROOT)
    assert "wanted stage 'prepare' to succeed; found FAILED: wanted " in str(caught.value)
    assert caught.value.exit_code == 2  # of the script
    assert f"read {stack.home / 'logs' / 'prepare.log'}" in str(caught.value)
    assert not list(tmp_path.glob("root/triplets-*"))


def test_everything_listens_on_loopback_alone_but_serves_replicas(stack: local.Stack) -> None:
    for process in local.members(stack.instance):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and "ServeReplica" not in process.name():
                assert connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1", "::1"), process.name()


def test_a_shard_that_hangs_and_dies_degrades_answers_and_comes_back(stack: local.Stack) -> None:
    """It hangs first: what died may be back within the time that a search has, and no answer is degraded then."""
    [shard] = [p for p in local.members(stack.instance) if p.name() == "ray::ServeReplica:search:shard-1"]
    answers = []

    def degraded() -> bool:
        answer = search(stack, f"red striped mug {len(answers)}")  # what was answered already is kept
        assert answer.status_code == 200, answer.text
        answers.append(answer.json())
        return bool(answers[-1]["degraded"])

    shard.suspend()
    assert degraded()
    shard.kill()
    until(lambda: not degraded(), "whole answer again", 60)
    for answer in answers:
        assert answer["degraded"] == (answer["coverage"]["answered"] < 2)
        assert answer["hits"]


def test_many_searches_at_once(stack: local.Stack) -> None:
    queries = ["red striped mug", "blue cushion", "yellow umbrella", "checked backpack"] * 25
    alone = {query: search(stack, query).json()["hits"] for query in set(queries)}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda query: search(stack, query), queries))
    assert {answer.status_code for answer in answers} == {200}
    for query, answer in zip(queries, answers, strict=True):
        assert [h["item_id"] for h in answer.json()["hits"]] == [h["item_id"] for h in alone[query]]


def test_keys_are_wanted_and_exchanged_while_it_runs_and_stand_in_no_log(
    stack: local.Stack, tmp_path: Path
) -> None:
    """The same endpoint, deployed anew with a file of keys, through HAProxy and at each replica's own port."""
    file = tmp_path / "keys.yaml"
    old, stock = keys.add(file, "old", ["search"]), keys.add(file, "stock", ["write"])
    settings = [f"--set=keys={file}", "--set=open_writes=false"]
    config = str(stack.home / "serve.yaml")
    assert told(stack, "serve", config, "--address", stack.dashboard, *settings) == {"endpoint": stack.endpoint}

    def asked(path: str, body: dict[str, Any], key: str = "", at: str = stack.endpoint) -> int:
        shown = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.post(f"{at}{path}", json=body, headers=shown, timeout=10).status_code

    def replicas() -> list[str]:
        """The ports that the ingress's replicas have themselves, where they answer by HTTP."""
        found = []
        for process in local.members(stack.instance):
            for one in process.net_connections("tcp") if "search:ingress" in process.name() else ():
                with suppress(httpx.HTTPError):  # of Ray's own ports
                    if one.status == psutil.CONN_LISTEN:
                        httpx.get(f"http://{local.HOST}:{one.laddr.port}/healthz", timeout=5).raise_for_status()
                        found.append(f"http://{local.HOST}:{one.laddr.port}")
        return found

    query, gone = {"query": "red striped mug"}, {"item_ids": ["nothing"]}
    until(lambda: asked("/search", query) == 401, "refusal without a key", 30)
    wrong = f"{old[:-1]}{'A' if old[-1] != 'A' else 'B'}"
    assert [asked("/search", query, key) for key in ("", wrong, old, stock)] == [401, 401, 200, 403]
    assert [asked("/items:delete", gone, key) for key in ("", old, stock)] == [401, 403, 200]
    direct = until(replicas, "replicas of the ingress", 30)
    assert {asked("/search", query, at=one) for one in direct} == {401}
    places = ["--address", stack.dashboard, "--tracking-uri", stack.mlflow, "--endpoint", stack.endpoint]
    assert told(stack, "status", *places)["endpoint"]["release"] is None
    release = told(stack, "status", *places, "--api-key", old)["endpoint"]["release"]
    assert release["model"]["version"] == "1"

    new = keys.add(file, "new", ["search"])
    until(lambda: asked("/search", query, new) == 200, "the new key to count", 10)
    assert asked("/search", query, old) == 200  # both count, until the old one is taken out
    keys.remove(file, "old")
    until(lambda: asked("/search", query, old) == 401, "the old key to count no more", 10)
    assert asked("/search", query, new) == 200
    assert asked("/search", query, new, direct[0]) == 200  # by the same process as before

    logs = [*stack.temporary.glob("session_latest/logs/**/*"), *(stack.home / "logs").iterdir()]
    text = b"".join(path.read_bytes() for path in logs if path.is_file())
    assert b"ServeReplica:search:ingress" in text  # these are the logs
    shown = {"old": old, "new": new, "stock": stock, "wrong": wrong}
    assert [name for name, key in shown.items() if key.encode() in text] == []


def test_stop_ends_all_of_it_and_nothing_else(stack: local.Stack) -> None:
    ours = local.members(stack.instance)
    stranger = subprocess.Popen(["sleep", "60"])
    assert local.stop(stack.home) >= len(ours)
    assert local.members(stack.instance) == []
    assert not stack.temporary.exists()
    for port in stack.ports.model_dump().values():
        assert ports_.is_free(port)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    assert list((stack.home / "artifacts").glob("index-*"))  # artifacts stay

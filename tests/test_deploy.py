"""What `deploy/` holds: manifests as their kinds are published, closed, and in step with what they deploy.

No Kubernetes and no container engine is asked: that the image builds and that pods start is not shown here.
"""

import copy
import importlib.metadata
import importlib.resources
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource
from typer.testing import CliRunner

from askew import __version__, config, keys, serving
from askew.pipeline import PipelineSettings
from askew.serving import ServingSettings

ROOT = Path(__file__).parent.parent
DEPLOY, SERVE = ROOT / "deploy", ROOT / "serve_configs"
KUBERNETES = "1.34"
Manifest = dict[str, Any]

FILES = sorted(
    p for p in [*DEPLOY.glob("*.yaml"), *(DEPLOY / "monitoring").glob("*.yaml")] if p.stem != "kustomization"
)
MANIFESTS = {
    f"{path.name}:{one['kind']}/{one['metadata']['name']}": one
    for path in FILES
    for one in yaml.safe_load_all(path.read_text())
}


def named(kind: str, name: str) -> Manifest:
    [found] = [m for m in MANIFESTS.values() if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def each(tree: Any, key: str) -> Iterator[Any]:
    """Yield what stands under a key, wherever it stands."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from each(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from each(value, key)


def pods(tree: Any) -> Iterator[Manifest]:
    """Yield each pod's spec."""
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from pods(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from pods(value)


# --- published schemas -----------------------------------------------------------------------------


def definitions() -> Registry[Any]:
    """Kubernetes' own schemas, which those of other kinds refer to."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    text = (folder / f"v{KUBERNETES}.0-local-strict" / "_definitions.json").read_text(encoding="utf-8")
    return Resource.from_contents(json.loads(text)) @ Registry()


SCHEMAS = {
    group: yaml.safe_load((ROOT / "tests" / "schemas" / f"{name}.yaml").read_text())
    for group, name in {"ray.io": "kuberay", "monitoring.coreos.com": "prometheus_operator"}.items()
}
DEFINITIONS = definitions()


def validate(manifest: Manifest) -> None:
    """Raises ValidationError where a manifest is not as published."""
    if schema := SCHEMAS.get(manifest["apiVersion"].partition("/")[0]):
        one = schema | {"$ref": f"#/$defs/{manifest['kind']}"}
        jsonschema.Draft202012Validator(one, registry=DEFINITIONS).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_as_its_kind_is_published(name: str) -> None:
    validate(MANIFESTS[name])


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_misspelt_field_is_refused(name: str) -> None:
    whole = MANIFESTS[name]
    level = "spec" if "spec" in whole else "metadata"
    for key in whole[level]:
        wrong = copy.deepcopy(whole)
        wrong[level][f"{key}x"] = wrong[level].pop(key)
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong)


@pytest.mark.parametrize(
    "path",
    [
        "rayClusterConfig.authOptions.mode",
        "rayClusterConfig.autoscalerOptions.upscalingMode",
        "rayClusterConfig.gcsFaultToleranceOptions.redisPassword",
        "rayClusterConfig.gcsFaultToleranceOptions.redisPassword.valueFrom",
        "rayClusterConfig.headGroupSpec.rayStartParams",
        "rayClusterConfig.headGroupSpec.template.spec.securityContext.runAsNonRoot",
        "rayClusterConfig.workerGroupSpecs.0.minReplicas",
        "rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.volumeMounts.0.mountPath",
        "rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.resources.limits",
        "upgradeStrategy.type",
    ],
)
def test_a_misspelt_field_deep_inside_is_refused(path: str) -> None:
    wrong = copy.deepcopy(named("RayService", "search"))
    *parents, last = (int(part) if part.isdecimal() else part for part in path.split("."))
    level = wrong["spec"]
    for parent in parents:
        level = level[parent]
    level[f"{last}x"] = level.pop(last)
    with pytest.raises(jsonschema.ValidationError):
        validate(wrong)


def test_values_of_another_type_are_refused() -> None:
    for change in ({"rayVersion": 2.6}, {"enableInTreeAutoscaling": "yes"}, {"workerGroupSpecs": {}}):
        wrong = copy.deepcopy(named("RayCluster", "askew"))
        wrong["spec"] |= change
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong)


def test_what_kuberay_checks_over_several_fields() -> None:
    for spec in clusters():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert not {"resources", "labels"} & group.keys()  # not beside num-cpus in rayStartParams
            assert "restartPolicy" not in group["template"]["spec"]  # the autoscaler's second version sets it
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["maxReplicas"]
        assert not {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & set(each(spec, "name"))
    for kind, name in (("RayCluster", "askew"), ("RayJob", "pipeline"), ("RayService", "search")):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", named(kind, name)["metadata"]["name"])


def clusters() -> list[Manifest]:
    job, service = named("RayJob", "pipeline")["spec"], named("RayService", "search")["spec"]
    return [named("RayCluster", "askew")["spec"], job["rayClusterSpec"], service["rayClusterConfig"]]


def test_kustomize_puts_it_all_together() -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not here")
    built = subprocess.run(
        ["kubectl", "kustomize", DEPLOY], capture_output=True, text=True, check=True, timeout=60
    )
    made = [one for one in yaml.safe_load_all(built.stdout) if one]
    told = {(m["kind"], m["metadata"]["name"]) for m in MANIFESTS.values()} | {("ConfigMap", "askew-dashboard")}
    assert {(m["kind"], m["metadata"]["name"]) for m in made} == told
    for manifest in made:
        validate(manifest)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "askew"
        assert manifest["metadata"]["labels"]["app.kubernetes.io/component"] in COMPONENTS
    images = {image for image in each(made, "image") if "askew" in image}
    assert images == {f"registry.example.com/askew:{__version__}"}
    [board] = [m for m in made if m["metadata"]["name"] == "askew-dashboard"]
    assert json.loads(board["data"]["askew.json"]) == json.loads((SERVE / "grafana.json").read_text())


COMPONENTS = {"ground", "monitoring", "cluster", "pipeline", "endpoint"}


def test_kustomization_names_every_file() -> None:
    for folder in (DEPLOY, DEPLOY / "monitoring"):
        told = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
        here = {p.name for p in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert {name for name in told if name.endswith(".yaml")} == here


# --- closed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, manifest in MANIFESTS.items() if any(pods(manifest))])
def test_a_pod_is_an_ordinary_user_who_can_do_little(name: str) -> None:
    for pod in pods(MANIFESTS[name]):
        user = pod["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["runAsUser"] >= 999
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in pod["containers"]:
            locked(container["securityContext"])
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            claimed = {
                c["metadata"]["name"] for found in each(MANIFESTS[name], "volumeClaimTemplates") for c in found
            }
            assert mounted <= {volume["name"] for volume in pod.get("volumes", [])} | claimed
            if container["image"].startswith("askew:"):
                assert "/tmp" in {
                    mount["mountPath"] for mount in container["volumeMounts"]
                }  # else nothing is writable


def locked(context: Manifest) -> None:
    assert context == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip


def test_pods_without_business_with_kubernetes_have_no_token_for_it() -> None:
    for manifest in MANIFESTS.values():
        for pod in pods(manifest):
            head = pod["containers"][0]["name"] == "ray-head"  # its autoscaler asks Kubernetes for pods
            assert pod.get("automountServiceAccountToken", True) is head


def test_every_cluster_wants_a_token_and_its_autoscaler_is_locked_too() -> None:
    for spec in clusters():
        assert spec["authOptions"] == {"mode": "token", "secretName": "askew-ray-token"}
        assert spec["enableInTreeAutoscaling"] is True
        locked(spec["autoscalerOptions"]["securityContext"])
        assert spec["autoscalerOptions"]["volumeMounts"] == [{"name": "scratch", "mountPath": "/tmp"}]
        head = spec["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert "scratch" in {volume["name"] for volume in head["template"]["spec"]["volumes"]}


def commands(start: str, end: str) -> str:
    """The commands in docs/cluster.md between two headings."""
    text = (ROOT / "docs" / "cluster.md").read_text().partition(f"\n## {start}\n")[2].partition(f"\n## {end}\n")[0]
    assert text
    return "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")


@pytest.mark.parametrize("places", [("2. Secrets", "3. Ground: storage, PostgreSQL, Redis, MLflow"),
                                    ("Plain machines", "What to set")])  # fmt: skip
def test_beyond_the_laptop_the_endpoint_has_the_keys_that_the_docs_make(
    places: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = re.findall(r"^askew (keys add [^#\n]*)", commands(*places), re.MULTILINE)
    for line in made:
        done = CliRunner().invoke(keys.app, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
    scopes = {scope for key in keys.read(tmp_path / "keys.yaml").keys for scope in key.scopes}
    assert scopes == {"search", "write"}
    told = yaml.safe_load((SERVE / "search.cluster.yaml").read_text())["applications"][0]["args"]
    asked = ServingSettings(**told)
    assert (asked.keys, asked.writes, asked.open_writes) == (Path("/etc/askew/keys.yaml"), True, False)
    serving._check(keys.read(tmp_path / "keys.yaml"), asked)


def test_the_file_of_keys_is_where_the_service_looks_for_it() -> None:
    spec = named("RayService", "search")["spec"]
    [application] = yaml.safe_load(spec["serveConfigV2"])["applications"]
    for pod in pods(spec):
        [secret] = [v["secret"] for v in pod["volumes"] if v["name"] == "keys"]
        assert secret == {"secretName": "askew-keys", "items": [{"key": "keys.yaml", "path": "keys.yaml"}]}
        [mount] = [m for c in pod["containers"] for m in c["volumeMounts"] if m["name"] == "keys"]
        assert f"{mount['mountPath']}/keys.yaml" == application["args"]["keys"]
        assert mount["readOnly"] is True
        assert "subPath" not in mount  # or another Secret would not come to a pod that runs
    assert "/etc/askew/keys.yaml" in commands("Plain machines", "What to set")


def test_ray_wants_its_token_wherever_it_starts_beyond_the_laptop() -> None:
    lines = commands("Plain machines", "What to set").splitlines()
    [token] = [n for n, line in enumerate(lines) if re.search(r"^export .*\bRAY_AUTH_MODE=token\b", line)]
    [made] = [n for n, line in enumerate(lines) if line.startswith("ray get-auth-token --generate")]
    starts = [n for n, line in enumerate(lines) if re.match("ray (start|job)|serve deploy", line)]
    assert len(starts) == 4
    assert max(token, made) < min(starts)
    assert "RAY_AUTH_MODE=token" in (SERVE / "search.cluster.yaml").read_text()
    [environment] = words("ENV")
    assert "RAY_AUTH_MODE=token" in environment.split()


@pytest.mark.parametrize("name", ["demo", "search", "search.cluster"])
def test_an_endpoint_listens_on_loopback_or_has_keys(name: str) -> None:
    told = yaml.safe_load((SERVE / f"{name}.yaml").read_text())
    [application] = told["applications"]
    here, args = told["http_options"]["host"] == "127.0.0.1", application["args"]
    assert here is (name != "search.cluster")
    assert here or (args["keys"] and not args.get("open_writes"))


def test_no_file_holds_a_secret_and_the_docs_make_each_that_is_wanted() -> None:
    assert not [name for name, manifest in MANIFESTS.items() if manifest["kind"] == "Secret"]
    wanted = {(ref["name"], ref["key"]) for ref in each([*MANIFESTS.values()], "secretKeyRef")}
    mounted = [s for s in each([*MANIFESTS.values()], "secret") if "items" in s]
    wanted |= {(secret["secretName"], item["key"]) for secret in mounted for item in secret["items"]}
    wanted |= {("askew-ray-token", "auth_token")}
    made = set()
    text = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    for name, options in re.findall(r"kubectl create secret generic (\S+)([^\n]*)", text):
        made |= {(name, key) for key in re.findall(r"--from-(?:literal|file)=([\w.]+)=", options)}
    assert wanted <= made
    envs = {r["name"] for r in each([*MANIFESTS.values()], "secretRef") if not r.get("optional")}
    assert envs <= {name for name, _ in made}


OPEN = {8000, 8080, 44217, 44227, 5000}  # the endpoint, metrics, and MLflow, which asks for a password


def test_nobody_from_elsewhere_reaches_rays_ports_or_a_database() -> None:
    policies = [m["spec"] for m in MANIFESTS.values() if m["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies  # all that is not allowed is refused
    for rule in (rule for policy in policies for rule in policy.get("ingress", [])):
        assert rule["from"]
        for peer in rule["from"]:
            assert peer.get("podSelector") or peer.get("namespaceSelector")
            inside = "namespaceSelector" not in peer
            operator = peer.get("podSelector") == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
            if not inside and not operator:
                assert {port["port"] for port in rule["ports"]} <= OPEN


def test_nothing_is_published_but_by_the_ingress() -> None:
    for manifest in MANIFESTS.values():
        assert manifest["kind"] != "Service" or manifest["spec"].get("type", "ClusterIP") == "ClusterIP"
    assert not {"NodePort", "LoadBalancer"} & set(each(clusters(), "serviceType"))
    for name, service, port in (("search", "search-serve-svc", 8000), ("mlflow", "mlflow", 5000)):
        ingress = named("Ingress", name)["spec"]
        [backend] = each(ingress, "backend")
        assert backend == {"service": {"name": service, "port": {"number": port}}}
        assert ingress["tls"][0]["hosts"] == [ingress["rules"][0]["host"]]


def test_mlflow_answers_to_the_names_that_it_is_called_by() -> None:
    [server] = named("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    [allowed] = [a.partition("=")[2].split(",") for a in server["args"] if a.startswith("--allowed-hosts=")]
    uri = named("ConfigMap", "askew-settings")["data"]["MLFLOW_TRACKING_URI"]
    assert uri.removeprefix("http://") in allowed
    assert named("Ingress", "mlflow")["spec"]["rules"][0]["host"] in allowed
    assert "*" not in "".join(allowed)
    assert "--app-name=basic-auth" in server["args"]


# --- in step with what is deployed ---------------------------------------------------------------


def test_the_service_serves_what_the_config_for_clusters_says() -> None:
    spec = named("RayService", "search")["spec"]
    told = yaml.safe_load((SERVE / "search.cluster.yaml").read_text())
    assert yaml.safe_load(spec["serveConfigV2"]) == told
    [serve] = spec["rayClusterConfig"]["workerGroupSpecs"]
    [worker] = serve["template"]["spec"]["containers"]
    port = told["http_options"]["port"]
    assert {"name": "serve", "containerPort": port} in worker["ports"]
    args = told["applications"][0]["args"]
    mounts = {mount["mountPath"] for mount in worker["volumeMounts"]}
    assert str(Path(args["cache"]).parent) in mounts  # every node sees the models


def test_its_least_replicas_fit_the_least_nodes_and_its_most_the_most() -> None:
    spec = named("RayService", "search")["spec"]
    args = ServingSettings(**yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"])
    [serve] = spec["rayClusterConfig"]["workerGroupSpecs"]
    cpus = float(serve["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    for bound in ("min_replicas", "max_replicas"):
        nodes = serve["minReplicas" if bound == "min_replicas" else "maxReplicas"]
        deployments = [args.ingress, args.encoder, *[args.shard] * args.num_shards]
        need = sum(one.num_cpus * getattr(one.scaling, bound) for one in deployments)
        assert need + 2 * args.items.num_cpus <= nodes * cpus  # items, and the switch, which takes as much
        assert getattr(args.shard.scaling, bound) <= nodes * (args.shard.max_replicas_per_node or 100)


def test_the_environment_is_what_the_config_for_clusters_asks_for() -> None:
    text = (SERVE / "search.cluster.yaml").read_text()
    found = re.findall(r'\b(RAY_SERVE_\w+)=(?:"([^"]*)"|(\S+))', text)
    asked = {name: quoted or plain for name, quoted, plain in found}
    told = named("ConfigMap", "askew-settings")["data"]
    assert len(asked) == 5
    assert {name: value for name, value in told.items() if name.startswith("RAY_SERVE_")} == asked


def test_the_alert_rules_are_the_same() -> None:
    assert named("PrometheusRule", "askew")["spec"] == yaml.safe_load((SERVE / "alerts.yaml").read_text())


def test_prometheus_is_sent_to_ports_that_pods_name() -> None:
    ports = {port["name"]: port["containerPort"] for found in each(clusters(), "ports") for port in found}
    asked = {end["port"] for found in each([*MANIFESTS.values()], "podMetricsEndpoints") for end in found}
    assert asked == {"metrics", "as-metrics", "dash-metrics"}
    assert asked <= ports.keys()
    assert {ports[name] for name in asked} <= {
        p["port"] for p in each(named("NetworkPolicy", "ray"), "ports") for p in p
    }


def test_the_job_runs_the_pipeline_with_settings_that_it_takes() -> None:
    spec = named("RayJob", "pipeline")["spec"]
    python, script, settings, *overrides = shlex.split(spec["entrypoint"])
    assert (python, in_image(script), in_image(settings)) == ("python", "jobs/pipeline.py", "jobs/pipeline.yaml")
    asked = config.load(
        PipelineSettings, ROOT / in_image(settings), [*overrides, "tracking_uri=http://mlflow:5000"]
    )
    serving = yaml.safe_load((SERVE / "search.cluster.yaml").read_text())["applications"][0]["args"]
    assert asked.model == serving["model"]
    assert asked.index.num_segments >= serving["num_shards"]
    groups = {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    assert asked.train.use_gpu
    assert groups["gpu"]["minReplicas"] >= asked.train.num_workers  # training waits for no GPU
    [worker] = groups["gpu"]["template"]["spec"]["containers"]
    assert float(worker["resources"]["limits"]["cpu"]) >= asked.train.cpus_per_worker
    [worker] = groups["cpu"]["template"]["spec"]["containers"]
    assert float(worker["resources"]["limits"]["cpu"]) >= spec["entrypointNumCpus"]
    mounts = {mount["mountPath"] for mount in worker["volumeMounts"]}
    assert {str(Path(asked.data).parent), str(asked.root.parent)} <= mounts


def test_versions_are_those_of_the_house() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert {spec["rayVersion"] for spec in clusters()} == {pinned["ray"]}
    images = set(each([*MANIFESTS.values()], "image"))
    assert {image for image in images if image.startswith("askew")} == {f"askew:{__version__}"}
    assert not [image for image in images if ":" not in image or image.endswith(":latest")]
    [image] = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())["images"]
    assert image["newTag"] == __version__


def test_every_file_is_told_of_in_the_docs() -> None:
    told = (ROOT / "docs" / "cluster.md").read_text()
    assert [p.name for p in [*FILES, DEPLOY / "Containerfile"] if p.name not in told and p.parent == DEPLOY] == []


# --- the image -------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's instructions in their order, with their words."""
    lines = [line for line in (DEPLOY / "Containerfile").read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in whole if line.strip())]


def words(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def in_image(path: str) -> str:
    """The place in the checkout of what stands at a path in the image."""
    [home] = words("WORKDIR")
    return path.removeprefix(f"{home}/")


def test_the_containerfile_passes_hadolint() -> None:
    lint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [lint, DEPLOY / "Containerfile"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored, *kept = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    assert ignored == "*"
    sources = [source for line in words("COPY") for source in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in kept
    assert {line.removeprefix("!") for line in kept if line.startswith("!")} == set(sources)


def test_the_image_runs_as_an_ordinary_user_and_starts_from_plain_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [base] = words("FROM")
    assert base.startswith("python:3.")
    assert project["requires-python"].startswith(f">={base.removeprefix('python:').partition('-')[0]}")
    assert instructions()[-1][0] == "CMD"
    assert words("USER") == ["1000:1000"]
    after = [word for word, _ in instructions()][[word for word, _ in instructions()].index("USER") :]
    assert "RUN" not in after
    user = {pod["securityContext"]["runAsUser"] for spec in clusters() for pod in pods(spec)}
    assert user == {1000}


def test_what_pip_installs_is_the_package_with_an_extra_that_it_has_and_pinned_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [line] = [run for run in words("RUN") if "pip install" in run]
    options = shlex.split(line.partition("pip install")[2])
    assert options[options.index("--constraint") + 1] == "constraints.txt"
    [wanted] = [option for option in options if option.startswith(".")]
    extras = re.fullmatch(r"\.\[([\w,]+)\]", wanted)
    assert extras
    asked = [*project["dependencies"]]
    for extra in extras[1].split(","):
        asked += project["optional-dependencies"][extra]
    pinned = {norm(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert [name for name in asked if norm(re.split(r"[\[<>=!~ ]", name)[0]) not in pinned] == []


def norm(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_started_exists() -> None:
    scripts = {entry.name for entry in importlib.metadata.entry_points(group="console_scripts")} | {"python"}
    [line] = [run for run in words("RUN") if "apt-get install" in run]
    packages = set(re.findall(r"[\w-]+", line.partition("--no-install-recommends")[2].partition("&&")[0]))
    assert packages == {"bash", "wget"}  # KubeRay's probes of a RayService's workers run both
    [health], [command] = words("HEALTHCHECK"), words("CMD")
    started = [json.loads(command)[0], json.loads(health.partition("CMD ")[2])[0]]
    containers = [c for manifest in MANIFESTS.values() for pod in pods(manifest) for c in pod["containers"]]
    started += [c["command"][0] for c in containers if c["image"].startswith("askew") and "command" in c]
    assert started == ["ray", "wget", "mlflow"]
    assert set(started) <= scripts | packages


def test_the_health_that_is_asked_for_is_one_that_ray_tells() -> None:
    [health] = words("HEALTHCHECK")
    path = re.search(r"http://127\.0\.0\.1:52365(/[\w/]+)", health)
    assert path
    assert f'"{path[1]}"' in (ray_folder() / "dashboard/modules/reporter/healthz_agent.py").read_text()


def ray_folder() -> Path:
    spec = find_spec("ray")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


# --- Prometheus and Grafana on one machine -------------------------------------------------------


def test_prometheus_on_one_machine_finds_rules_and_nodes() -> None:
    folder = DEPLOY / "local-monitoring"
    told = yaml.safe_load((folder / "prometheus.yml").read_text())
    [rules] = told["rule_files"]
    assert (folder / rules).resolve() == SERVE / "alerts.yaml"
    [source] = told["scrape_configs"][0]["http_sd_configs"]
    path = re.fullmatch(r"http://127\.0\.0\.1:8266(/.*)", source["url"])
    assert path
    assert f'"{path[1]}"' in (ray_folder() / "dashboard/modules/reporter/reporter_head.py").read_text()


def test_grafana_on_one_machine_finds_prometheus_and_the_dashboard() -> None:
    folder = DEPLOY / "local-monitoring" / "grafana"
    [source] = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    [provider] = yaml.safe_load((folder / "dashboards" / "askew.yaml").read_text())["providers"]
    path = Path(provider["options"]["path"].replace("$ASKEW_HOME", str(ROOT)))
    boards = [json.loads(p.read_text()) for p in path.glob("*.json")]
    assert [board["uid"] for board in boards] == ["askew-search"]
    assert all("panels" in board for board in boards)

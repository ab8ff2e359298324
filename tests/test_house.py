"""The shape of the house itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


HEAVY = ("torch", "transformers", "openvino", "mlflow", "matplotlib", "scipy")


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("deployments", HEAVY), ("ingress", HEAVY), ("cli", HEAVY), ("client", (*HEAVY, "ray", "numpy")),
        ("serving", ("torch", "transformers", "openvino", "matplotlib")),
    ],
)  # fmt: skip
def test_who_needs_little_loads_little(module: str, without: tuple[str, ...]) -> None:
    """A shard that loads torch takes four times as long to start, and three times the memory."""
    code = f"import sys, askew.{module}; print(*[name for name in {without!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


RUNS_CODE = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}  # when it reads data
NEVER = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "pd.read_pickle",
    "torch.jit.load", "torch.hub.load", "torch.package",
}  # fmt: skip
ONLY_WITH = {  # calls that may run code, and what keeps them from it
    "torch.load": ("weights_only", True), "AutoConfig.from_pretrained": ("trust_remote_code", False),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "AutoModel.from_config": ("trust_remote_code", False), "kind.from_pretrained": ("use_safetensors", True),
}  # fmt: skip
NEVER_SAID = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False, "shell": True}


def runs_code(source: str) -> list[str]:
    """What in a source might run code that stands in data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            found += [name for name in names if name.partition(".")[0] in RUNS_CODE]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            said = {one.arg: getattr(one.value, "value", ...) for one in node.keywords}
            wanted, value = ONLY_WITH.get(name, ("", None))
            found += [name] if name in NEVER or (wanted and said.get(wanted) is not value) else []
            found += [
                f"{what}=…" for what, value in NEVER_SAID.items() if said.get(what, not value) is not (not value)
            ]
    return found


def test_nothing_that_is_read_is_run() -> None:
    for path in [*SOURCES, *(ROOT / "jobs").glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        assert runs_code(path.read_text()) == [], path


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "import cloudpickle as c", "torch.load(path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "yaml.load(text)",
        "np.load(path, allow_pickle=how)", "pd.read_pickle(path)", "eval(text)", "run(line, shell=True)",
        "AutoConfig.from_pretrained(name)", "kind.from_pretrained(name, use_safetensors=False)",
    ],
)  # fmt: skip
def test_what_would_be_run_is_found(source: str) -> None:
    assert runs_code(source)


def test_what_runs_nothing_is_left_alone() -> None:
    assert not runs_code(
        "np.load(p)\nnp.load(p, allow_pickle=False)\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)"
    )


def test_ci_is_what_a_person_runs() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make check test", "make soak MINUTES=5 OPTIONS=--check"]


def test_constraints_name_no_host_and_no_path() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line), line


LARGE = """
import pathlib, sys
import numpy as np
from askew.ann import Index

index, path = Index.flat(2), pathlib.Path(sys.argv[1])
index.add(np.zeros((40_000, 2), np.float32))
index.write(path)
known = ["torch" in sys.modules]
index, half = Index.read(path, index.design), Index.read(path, index.design)
known.append("torch" in sys.modules)
index.join(half) if sys.argv[2] == "joined" else index.add(np.zeros((40_000, 2), np.float32))
index.write(path)
Index.read(path, index.design) if sys.argv[2] == "read" else None
print(*known, "torch" in sys.modules)
"""


@pytest.mark.parametrize("how", ["joined", "read"])
def test_an_exact_index_that_is_large_loads_torch_as_it_opens(tmp_path: Path, how: str) -> None:
    """Later it would be in the midst of a search, which waits for it."""
    command = [sys.executable, "-c", LARGE, str(tmp_path / "index"), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]

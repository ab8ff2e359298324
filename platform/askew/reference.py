"""Reference: every setting there is, as a page, told by the classes that hold them.

What a setting means is the comment beside its field, or beside its key in the stage's settings file: nothing is
written twice. Knows nothing of what settings do.
"""

import ast
import functools
import io
import re
import sys
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic.fields import FieldInfo

from askew import artifacts
from askew.catalogue import DrawSettings
from askew.config import Settings
from askew.evaluation import EvaluateSettings
from askew.indexing import IndexSettings
from askew.pipeline import PipelineSettings
from askew.promotion import PromoteSettings
from askew.recipes import TrainSettings
from askew.serving import ServingSettings
from askew.triplets import PrepareSettings
from askew.updating import UpdateSettings

ROOT = Path(__file__).parents[2]
FILES: Mapping[type[Settings], str] = {
    DrawSettings: "jobs/draw.yaml", PrepareSettings: "jobs/prepare.yaml", TrainSettings: "jobs/train.data.yaml",
    IndexSettings: "jobs/index.yaml", EvaluateSettings: "jobs/evaluate.yaml",
    PromoteSettings: "jobs/promote.yaml", UpdateSettings: "jobs/update.yaml",
    PipelineSettings: "jobs/pipeline.yaml", ServingSettings: "serve_configs/search.yaml",
}  # fmt: skip
COMMON = {  # what is the same wherever it stands, and said nowhere beside it
    "root": "folder that artifacts are made in; on a cluster one that all nodes see",
    "triplets": "folder of the triplets",
    "tracking_uri": "of MLflow; by default the environment's MLFLOW_TRACKING_URI",
    "model": "name of the registered model in MLflow",
    "version": "a number, or an alias",
    "batch_size": "how many go through the model at once",
    "device": "where the model computes",
    "seed": "of all that is drawn by chance",
}
KINDS: Mapping[object, str] = {
    int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", Any: "anything",
}  # fmt: skip
BOUNDS = {
    "ge": "≥ {}",
    "gt": "> {}",
    "le": "≤ {}",
    "lt": "< {}",
    "min_length": "at least {}",
    "pattern": "like `{}`",
}
KEY = re.compile(r"^(?P<indent>[ ]*(?:- )?)(?:# )?(?P<key>\w+):(?P<value>.*?)(?:\s#\s(?P<said>.*))?$")
END = "...\n"  # which YAML puts behind a plain value
MORE = re.compile(r"^\s+#\s(?P<said>.*)$")
HEAD = """\
# Every setting

<!-- Written by `make docs` (askew.reference) from the settings themselves. Do not edit. -->

A stage reads a YAML file and then `dotted.key=value` from its command line, where values are YAML too:
`python jobs/train.py jobs/train.data.yaml triplets=… stages.joint.steps=3000`. The endpoint reads the `args` of
its application in a Serve config. A key that is not listed here is refused by name, and so is a value outside its
bounds. **required** settings have no default. Some settings must also fit each other; the message says which.
"""


class Row(NamedTuple):
    """One setting."""

    key: str
    kind: str
    default: str
    bounds: str
    said: str


def page() -> str:
    """Write the page: a section for each stage and the endpoint, and for each group that stands in a list."""
    parts, groups = [HEAD], dict[type[Settings], None]()
    for settings, file in FILES.items():
        notes = _yaml_comments((ROOT / file).read_text(encoding="utf-8"))
        parts.append(_section(settings, notes, groups))
    done = set[type[Settings]]()
    while left := [group for group in groups if group not in done]:
        for group in left:
            parts.append(_section(group, {}, groups))
            done.add(group)
    return "\n".join(parts)


def _section(settings: type[Settings], notes: Mapping[str, str], groups: dict[type[Settings], None]) -> str:
    told = " ".join((settings.__doc__ or "").split("\n\n")[0].split())
    lines = [f"## {settings.__name__}", "", told, ""]
    lines += ["| setting | kind | default | bounds | |", "|---|---|---|---|---|"]
    for row in _rows(settings, None, "", notes, groups):
        cells = (f"`{row.key}`", row.kind, row.default, row.bounds, row.said)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _rows(
    settings: type[Settings], given: Settings | None, prefix: str, notes: Mapping[str, str],
    groups: dict[type[Settings], None],
) -> Iterator[Row]:  # fmt: skip
    """Tell the fields, those of a group as dotted keys; groups that want sections of their own are noted."""
    for name, field in settings.model_fields.items():
        key, inner = prefix + name, field.annotation
        if _is_group(inner) and inner not in FILES and not _apart(settings, inner):
            value = getattr(given, name) if given else field.default
            yield from _rows(inner, value if isinstance(value, inner) else None, f"{key}.", notes, groups)
            continue
        groups.update(dict.fromkeys(group for group in _groups(inner) if group not in FILES))
        said = _field_comments(settings).get(name) or notes.get(key) or field.description or COMMON.get(name, "")
        yield Row(key, _kind(inner), _default(field, given, name), _bounds(field.metadata), said)


def _apart(settings: type[Settings], group: type[Settings]) -> bool:
    """Whether a group wants a section of its own: it stands there more than once, or within itself."""
    kinds = [field.annotation for field in settings.model_fields.values()]
    inside = [one for field in group.model_fields.values() for one in _groups(field.annotation)]
    return kinds.count(group) > 1 or group in inside


def _is_group(annotation: Any) -> typing.TypeGuard[type[Settings]]:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _groups(annotation: Any) -> Iterator[type[Settings]]:
    if _is_group(annotation):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _groups(inner)


# --- how a field reads ---------------------------------------------------------------------------


def _kind(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_group(annotation):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    if origin is typing.Annotated:
        return " ".join(filter(None, (_kind(inner[0]), _bounds(inner[1:]))))
    if origin is typing.Literal:
        return ", ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("empty" if one is type(None) else _kind(one) for one in inner)
    if origin is tuple:
        return f"list of {_kind(inner[0])}" if inner[-1] is Ellipsis else f"{len(inner)} × {_kind(inner[0])}"
    if origin is dict:
        return f"map of {_kind(inner[0])} to {_kind(inner[1])}"
    return KINDS[annotation]


def _default(field: FieldInfo, given: Settings | None, name: str) -> str:
    if given is None and field.is_required():
        return "**required**"
    if field.default_factory not in (None, dict):
        return "the environment's"
    value = getattr(given, name) if given else field.get_default(call_default_factory=True)
    return _yaml(value)


def _yaml(value: Any) -> str:
    if value is None or value == "":
        return "empty"
    if isinstance(value, Settings):
        value = value.model_dump(mode="json", exclude_defaults=True)
        if not value:
            return "all defaults"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, sort_keys=False)
    return f"`{text.removesuffix(END).strip()}`"


def _bounds(metadata: Any) -> str:
    flat = [inner for one in metadata for inner in (one.metadata if isinstance(one, FieldInfo) else (one,))]
    held = ((told, getattr(one, name, None)) for name, told in BOUNDS.items() for one in flat)
    found = ((told, bound) for told, bound in held if bound is not None)
    return ", ".join(told.format(bound if isinstance(bound, str) else f"{bound:g}") for told, bound in found)


# --- what is said beside it ----------------------------------------------------------------------


@functools.cache
def _field_comments(settings: type[Settings]) -> dict[str, str]:
    """The comments beside a class's fields, and those of the classes that it is made from."""
    found: dict[str, str] = {}
    for kind in reversed([one for one in settings.__mro__ if _is_group(one)]):
        source = Path(str(sys.modules[kind.__module__].__file__)).read_text(encoding="utf-8")
        trees = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
        body = next(node.body for node in trees if node.name == kind.__name__)
        beside, alone = _comments(source)
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                end = node.end_lineno or node.lineno
                said = [beside[line] for line in range(node.lineno, end + 1) if line in beside]
                while said and (end := end + 1) in alone:
                    said.append(alone[end])
                found[node.target.id] = " ".join(said)
    return found


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """The comments of a source by line: those beside code, and those that stand alone."""
    beside, alone = dict[int, str](), dict[int, str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# fmt", "# type")):
            lines = alone if token.line.lstrip().startswith("#") else beside
            lines[token.start[0]] = token.string.removeprefix("#").strip()
    return beside, alone


def _yaml_comments(text: str) -> dict[str, str]:
    """The comments of a settings file by dotted key; those of a Serve config by the key below `args`."""
    found, above, last = dict[str, str](), list[tuple[int, str]](), ""
    for line in text.splitlines():
        if matched := KEY.match(line):
            indent = len(matched["indent"])
            above = [*(one for one in above if one[0] < indent), (indent, matched["key"])]
            last = ".".join(key for _, key in above).removeprefix("applications.args.")
            found[last] = matched["said"] or ""
        elif (matched := MORE.match(line)) and found.get(last):
            found[last] += f" {matched['said']}"
        else:
            last = ""
    return found


if __name__ == "__main__":
    artifacts.write_text(Path(sys.argv[1]), page())

"""Checkpoints: all that a training step needs, as plain files: weights, optimiser, and where it stands.

A step's data and its random numbers are functions of the seed and the step (see `batches` and `caching`), so
that a position is a number. Nothing is pickled. Knows nothing of stages or of Ray.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from askew import artifacts
from askew.errors import ArtifactError

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1
AVERAGE = "average.safetensors"  # of a stage that keeps the running mean of its weights


def save(
    folder: Path, towers: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any],
    average: nn.Module | None = None,
) -> None:  # fmt: skip
    """Write a checkpoint into an empty folder; its state, written last, holds the others' checksums."""
    weights = {WEIGHTS: towers} | ({AVERAGE: average} if average else {})
    for name, module in weights.items():
        save_file({k: v.detach().contiguous() for k, v in module.state_dict().items()}, folder / name)
    held = optimizer.state_dict()
    tensors = {
        f"{number}.{name}": torch.as_tensor(value).contiguous()
        for number, values in held["state"].items()
        for name, value in values.items()
    }
    save_file(tensors, folder / OPTIMIZER)
    sums = {name: artifacts.sha256(folder / name) for name in (*weights, OPTIMIZER)}
    told = {"format": FORMAT} | state | {"groups": held["param_groups"], "files": sums, "sum": ""}
    artifacts.write_text(folder / STATE, artifacts.sealed(json.dumps(told)))


def state_of(folder: Path) -> dict[str, Any]:
    """Read where a checkpoint stands, and check its files.

    Raises ArtifactError when it is not whole, or of another format.
    """
    do = "go on with the version of askew that wrote it, or remove the folder and train again"
    try:
        content = (folder / STATE).read_bytes()
        artifacts.refuse_format(folder / STATE, content, FORMAT, do, unsaid=FORMAT)
        state: dict[str, Any] = json.loads(content)
        _check_seal(folder / STATE, content, state)
        altered = [name for name, sum_ in state["files"].items() if artifacts.sha256(folder / name) != sum_]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"a checkpoint in {folder / STATE}", f"{error}", "remove the folder, and train again"
        ) from error
    if altered:
        do = "remove the folder, and train again"
        raise ArtifactError(f"{folder / altered[0]} as it was written", "other content", do)
    return state


def _check_seal(path: Path, content: bytes, state: dict[str, Any]) -> None:
    """Check a state's text by its own sum; before there were sums, the files' were the last that it said."""
    do = "remove the folder, and train again"
    if [*state][-1:] not in (["sum"], ["files"]):
        raise ArtifactError(f"{path} as it was written", "other content", do)
    artifacts.check_seal(path, content, str(state.pop("sum", "")), do)


def load_weights(folder: Path, towers: nn.Module, name: str = WEIGHTS) -> None:
    """Load the weights that a step goes on with. Raises ArtifactError when they are of other shapes."""
    try:
        towers.load_state_dict(_tensors(folder / name))
    except RuntimeError as error:
        found = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"weights of these towers in {folder}", found, "train with the settings of then"
        ) from error


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        do = "remove the checkpoint's folder, and train again"
        raise ArtifactError(f"tensors in {path}", str(error), do) from error


def load_result(folder: Path, towers: nn.Module) -> None:
    """Load the weights that came out of a stage: their running mean where it kept one."""
    load_weights(folder, towers, AVERAGE if (folder / AVERAGE).is_file() else WEIGHTS)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser's state, of the parts that it was saved with.

    Each tensor is laid out in memory as its parameter is: the fused kernels take them for granted to be alike, and
    a checkpoint knows no channels-last.
    """
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in _tensors(folder / OPTIMIZER).items():
        number, what = name.split(".")
        state.setdefault(int(number), {})[what] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": state_of(folder)["groups"]})
    for parameter, held in optimizer.state.items():
        for name, value in held.items():
            if value.shape == parameter.shape:
                held[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

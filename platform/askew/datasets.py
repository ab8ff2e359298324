"""The border to Ray Data: work cut into units that any number of workers do in any order.

A unit is a plain dict that names its input and the number of its output part, so that what is written
depends on the units alone, never on who did them. Knows nothing of what the units mean.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data

from askew import artifacts, errors

Unit = dict[str, Any]
REFUSED, MARK = "askew refused", "askew mark"


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, as in a job; without one, start one here.

    Ray by itself would look for the last cluster of this machine, and wait for it though it is gone.
    """
    if not ray.is_initialized():
        ray.init(os.environ.get("RAY_ADDRESS", "local"), log_to_driver=True, configure_logging=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def nodes() -> int:
    """Count the cluster's living nodes."""
    return sum(1 for node in ray.nodes() if node["Alive"])


def resources() -> dict[str, float]:
    """What the cluster has in all, by name: CPU, GPU, …"""
    return dict(ray.cluster_resources())


def check_gpus(num_workers: int, otherwise: str) -> None:
    """Join the cluster. Raises ConfigError when it has no GPU for each worker; `otherwise` needs none."""
    connect()
    if (gpus := int(resources().get("GPU", 0))) < num_workers:
        wanted, do = f"{num_workers} GPUs, one for each worker", f"lower num_workers, or {otherwise}"
        raise errors.ConfigError(wanted, f"{gpus} in the cluster", do)


def spread(
    units: Sequence[Unit],
    work: Callable[[Unit], Unit] | type,
    doing: str,
    arguments: Sequence[Any] = (),
    num_actors: int | None = None,
    marks: Path | None = None,
    num_gpus: float = 0,
) -> list[Unit]:
    """Do `work` on every unit by Ray Data, one task each; returns its small results in order, printing progress.

    `work` is a function, or a class whose instances, made with `arguments` in `num_actors` actors, are called,
    each with `num_gpus` of its own.
    With `marks`, a folder, each unit's result is noted there when it is done, and a later run of the same
    units does those alone that are not. An AskewError of a worker is raised here.
    """
    units = [
        {**unit, MARK: str(marks / f"{number:06d}.json")} if marks else unit for number, unit in enumerate(units)
    ]
    results: dict[int, Unit] = {n: _read(unit) for n, unit in enumerate(units) if _is_done(unit)}
    left = [n for n in range(len(units)) if n not in results]
    progress = Progress(doing, len(units), len(results))
    todo = [units[n] for n in left]
    for number, result in zip(left, _done(todo, work, arguments, num_actors, num_gpus), strict=True):
        results[number] = result
        progress.step()
    return [results[number] for number in range(len(units))]


def _done(
    units: Sequence[Unit],
    work: Callable[[Unit], Unit] | type,
    arguments: Sequence[Any],
    num_actors: int | None,
    num_gpus: float,
) -> Iterator[Unit]:
    """Do the units, and yield their results in order."""
    if not units:
        return
    connect()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    # as text: Arrow, which Ray Data holds rows in, would give all units the same columns
    rows = ray.data.from_items([{"unit": json.dumps(unit)} for unit in units], override_num_blocks=len(units))
    if isinstance(work, type):
        pool = ray.data.ActorPoolStrategy(size=min(num_actors or 1, len(units)))
        how = {"compute": pool, "num_cpus": 1, "num_gpus": num_gpus}
        rows = rows.map(_Actor, fn_constructor_args=(work, tuple(arguments)), **how)
    else:
        rows = rows.map(_telling, fn_kwargs={"work": work}, num_cpus=1)
    for row in rows.iter_rows():
        answer = json.loads(row["answer"])
        if REFUSED in answer:
            kind, *words = answer[REFUSED]
            raise getattr(errors, kind)(*words)
        yield answer


def _telling(row: dict[str, str], work: Callable[[Unit], Unit]) -> dict[str, str]:
    """Do the work; an AskewError becomes a result, as Ray Data would hide its kind and words in a traceback."""
    unit = json.loads(row["unit"])
    mark = unit.pop(MARK, None)
    try:
        with artifacts.room(Path(mark or ".").absolute().parent):
            answer = json.dumps(work(unit))
    except errors.AskewError as error:
        return {"answer": json.dumps({REFUSED: [type(error).__name__, *error.args]})}
    if mark:
        artifacts.write_text(Path(mark), answer)
    return {"answer": answer}


class _Actor:
    """Holds an instance of a class, made at the first unit so that what it refuses then is told too."""

    def __init__(self, kind: type, arguments: tuple[Any, ...]) -> None:
        self._make: Callable[[], Any] = functools.cache(lambda: kind(*arguments))

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        return _telling(row, lambda unit: dict(self._make()(unit)))


def _is_done(unit: Unit) -> bool:
    return MARK in unit and Path(unit[MARK]).exists()


def _read(unit: Unit) -> Unit:
    return dict(json.loads(Path(unit[MARK]).read_bytes()))


class Progress:
    """Prints `askew: <doing> 3/8` lines, at most one each two seconds, and the last one always."""

    def __init__(self, doing: str, total: int, done: int = 0) -> None:
        self._doing, self._total, self._count, self._last = doing, total, done, 0.0

    def step(self, count: int = 1) -> None:
        """Count up, and print when it is time."""
        self._count += count
        if self._count >= self._total or time.monotonic() - self._last > 2:
            self._last = time.monotonic()
            print(f"askew: {self._doing} {self._count:,}/{self._total:,}", flush=True)

"""The border to Ray Data: work cut into units that any number of workers do in any order.

A unit is a plain dict that names its input and the number of its output part, so that what is written
depends on the units alone, never on who did them. Knows nothing of what the units mean.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.data

from askew import errors

Unit = dict[str, Any]
REFUSED = "askew refused"


def connect() -> None:
    """Join the running Ray cluster (a job's RAY_ADDRESS), or start one here when there is none."""
    if not ray.is_initialized():
        ray.init(log_to_driver=True, configure_logging=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def nodes() -> int:
    """Count the cluster's living nodes."""
    return sum(1 for node in ray.nodes() if node["Alive"])


def spread(
    units: Sequence[Unit],
    work: Callable[[Unit], Unit] | type,
    doing: str,
    arguments: Sequence[Any] = (),
    num_actors: int | None = None,
) -> list[Unit]:
    """Do `work` on every unit by Ray Data, one task each; returns its small results in order, printing progress.

    `work` is a function, or a class whose instances, made with `arguments` in `num_actors` actors, are called.
    An AskewError of a worker is raised here.
    """
    connect()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = ray.data.from_items(list(units), override_num_blocks=len(units))
    if isinstance(work, type):
        pool = ray.data.ActorPoolStrategy(size=min(num_actors or 1, len(units)))
        given = (work, tuple(arguments))
        rows = rows.map(_Actor, fn_constructor_args=given, compute=pool, num_cpus=1)
    else:
        rows = rows.map(_telling, fn_kwargs={"work": work}, num_cpus=1)
    done, results = Progress(doing, len(units)), []
    for row in rows.iter_rows():
        if refused := row.pop(REFUSED, None):
            kind, *words = json.loads(refused)
            raise getattr(errors, kind)(*words)
        results.append(dict(row))
        done.step()
    return results


def _telling(unit: Unit, work: Callable[[Unit], Unit]) -> Unit:
    """Do the work; an AskewError becomes a result, as Ray Data would hide its kind and words in a traceback."""
    try:
        return work(unit)
    except errors.AskewError as error:
        return {REFUSED: json.dumps([type(error).__name__, *error.args])}


class _Actor:
    """Holds an instance of a class, made at the first unit so that what it refuses then is told too."""

    def __init__(self, kind: type, arguments: tuple[Any, ...]) -> None:
        self._make: Callable[[], Any] = functools.cache(lambda: kind(*arguments))

    def __call__(self, unit: Unit) -> Unit:
        return _telling(unit, lambda unit: dict(self._make()(unit)))


class Progress:
    """Prints `askew: <doing> 3/8` lines, at most one each two seconds, and the last one always."""

    def __init__(self, doing: str, total: int) -> None:
        self._doing, self._total, self._count, self._last = doing, total, 0, 0.0

    def step(self, count: int = 1) -> None:
        """Count up, and print when it is time."""
        self._count += count
        if self._count >= self._total or time.monotonic() - self._last > 2:
            self._last = time.monotonic()
            print(f"askew: {self._doing} {self._count:,}/{self._total:,}", flush=True)

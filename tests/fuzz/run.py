"""Fuzz by coverage: `make fuzz MINUTES=1`, so many minutes for each target; `OPTIONS='--only photo'` for some.

Progress goes to stderr, and the last line of stdout is one JSON object of figures and targets.

Each target of tests/fuzz/targets.py runs in a process of its own under atheris, which changes bytes at random, and
values of JSON one by one, and keeps what reaches code that nothing reached before. FAISS, Arrow, Pillow and other
libraries in C are not instrumented: what it finds in them it finds by chance. An exception that is not documented,
a crash of the process, an input that takes longer than 10 s, or memory beyond 3 GB counts as a crash; its input is
written to the folder `--found`. Put it under tests/fuzz/corpus, where tests/test_fuzz.py replays it.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "platform")]
SLOW_S, MEMORY_MB = 10, 3000
VALUES = (
    None,
    True,
    0,
    -1,
    2**53,
    2**63,
    10**400,
    0.5,
    1e308,
    "",
    "x",
    "\ud800",
    "../x",
    "a\0",
    "x" * 300,
    [],
    {},
)


def say(text: str) -> None:
    """Tell a person how far it is."""
    print(f"fuzz: {text}", file=sys.stderr, flush=True)


def changed(value: Any, chance: random.Random) -> Any:
    """Change one value of JSON: into another, into one of its parts, or a part of it."""
    if isinstance(value, dict | list) and value and chance.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        copy = dict(value) if isinstance(value, dict) else list(value)
        how = chance.random()
        if how < 0.1:
            del copy[key]
        elif how < 0.15 and isinstance(copy, list):
            copy.append(copy[key])
        elif how < 0.2 and isinstance(copy, dict):
            copy[str(chance.choice(VALUES))] = copy.pop(key)
        else:
            copy[key] = changed(copy[key], chance)
        return copy
    return chance.choice(VALUES)


def fuzz(name: str, seconds: int, found: Path) -> None:
    """Run one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["askew", "json", "tarfile", "yaml"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        start = 1 if name == "manifest" else 0
        if target.json and chance.random() < 0.7:
            try:
                made = json.dumps(changed(json.loads(data[start:]), chance)).encode()
            except (ValueError, RecursionError):
                pass
            else:
                return data[:start] + made[: most - start]
        return bytes(atheris.Mutate(data, most))

    known = HERE / "corpus" / name
    atheris.Setup(
        [
            name, str(corpus), *([str(known)] if known.is_dir() else []), f"-max_total_time={seconds}",
            f"-timeout={SLOW_S}", f"-rss_limit_mb={MEMORY_MB}", f"-max_len={target.most}",
            f"-artifact_prefix={found}/{name}-", "-print_final_stats=1", "-verbosity=1",
        ],
        target.run,
        custom_mutator=mutated,
    )  # fmt: skip
    atheris.Fuzz()


def tried(name: str, seconds: int, found: Path) -> dict[str, int]:
    """Run one target in a process of its own; returns how many inputs it tried, and whether it crashed."""
    command = [sys.executable, __file__, "--target", name, "--seconds", str(seconds), "--found", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    runs = re.findall(r"number_of_executed_units: (\d+)", done.stderr) or re.findall(
        r"^#(\d+)", done.stderr, re.MULTILINE
    )
    count, crashed = int(runs[-1]) if runs else 0, done.returncode != 0
    if crashed:
        say("\n".join(done.stderr.splitlines()[-60:]))
    say(f"{name}: {count:,} inputs, {'a crash' if crashed else 'no crash'}")
    return {"inputs": count, "crashes": int(crashed)}


def main(
    minutes: Annotated[float, typer.Option(help="for each target")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="targets, all by default")] = None,
    found: Annotated[Path, typer.Option(help="where inputs that crash are put")] = Path("fuzz-found"),
    target: Annotated[str, typer.Option(hidden=True)] = "",
    seconds: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Fuzz every target, and print what came of it."""
    if target:
        fuzz(target, seconds, found)
        return
    from tests.fuzz.targets import TARGETS

    if unknown := sorted(set(only or ()) - set(TARGETS)):
        raise typer.BadParameter(f"{', '.join(unknown)}: none of {', '.join(TARGETS)}")
    found.mkdir(exist_ok=True)
    figures = {name: tried(name, max(1, round(60 * minutes)), found) for name in only or TARGETS}
    crashes = sum(one["crashes"] for one in figures.values())
    targets = {"crashes": {"value": crashes, "bound": 0, "holds": crashes == 0}}
    print(json.dumps({"figures": figures, "targets": targets}))
    sys.exit(0 if crashes == 0 else 1)


if __name__ == "__main__":
    typer.run(main)

"""What fuzzing found, replayed: each input that once crashed a target, and what each target begins from."""

from pathlib import Path

import pytest
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
FOUND = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_is_mended(path: Path) -> None:
    TARGETS[path.parent.name].run(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_what_it_begins_from_and_damage_to_it(name: str) -> None:
    target = TARGETS[name]
    target.run(b"")
    for seed in target.seeds():
        target.run(seed)
        for at in range(0, len(seed), max(1, len(seed) // 20)):
            target.run(seed[:at])
            target.run(seed[:at] + bytes([seed[at] ^ 0x81]) + seed[at + 1 :])

"""The bounds that docs/limits.md states are those of the code."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "limits.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| .*? \| ([\d,]+)(?: (KiB|MiB))? \| `(\w+)\.(\w+)` \|$", PAGE, re.MULTILINE)
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}


def test_every_row_with_a_constant_is_read() -> None:
    assert len(ROWS) == len(re.findall(r"`\w+\.[A-Z_]+` \|$", PAGE, re.MULTILINE)) > 20


@pytest.mark.parametrize(("number", "unit", "module", "name"), ROWS, ids=[row[3] for row in ROWS])
def test_a_bound_is_the_codes(number: str, unit: str, module: str, name: str) -> None:
    stated = int(number.replace(",", "")) * UNITS[unit]
    assert stated == getattr(importlib.import_module(f"askew.{module}"), name)


def test_text_is_cut_where_it_says() -> None:
    from askew.towers import TowerSettings

    settings = TowerSettings()
    assert f"queries at {settings.query_length} tokens and titles at {settings.title_length}" in PAGE

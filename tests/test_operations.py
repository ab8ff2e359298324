"""docs/operations.md has a section for each alert and for no other, and its check of a copy finds damage."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from askew import artifacts

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_each_alert_has_a_section_and_each_section_an_alert() -> None:
    rules = yaml.safe_load((ROOT / "serve_configs" / "alerts.yaml").read_text(encoding="utf-8"))
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    section = PAGE.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert re.findall(r"^### (\w+)$", section, re.MULTILINE) == alerts


def test_the_metrics_that_it_names_are_measured() -> None:
    source = (ROOT / "platform" / "askew" / "telemetry.py").read_text(encoding="utf-8")
    for name in re.findall(r"`ray_(askew_\w+)`", PAGE):
        assert f'"{name.removesuffix("_total")}"' in source, name


def test_the_check_of_a_copy_finds_damage(tmp_path: Path) -> None:
    [script] = re.findall(r"<!-- file: check_artifacts\.py -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "check_artifacts.py").write_text(script)
    for number in (1, 2):
        with artifacts.draft(tmp_path / "root", "catalogue", {"number": number}, {}) as draft:
            (draft.folder / "rows.txt").write_text("rows")

    def check() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "check_artifacts.py", "root"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    whole = check()
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("whole: catalogue-") == 2
    damaged = sorted(tmp_path.glob("root/*/rows.txt"))[1]
    damaged.write_text("rotten")
    found = check()
    assert found.returncode != 0
    assert f"{damaged.relative_to(tmp_path)} as its manifest states it; found other content" in found.stderr

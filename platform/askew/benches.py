"""Benches: the scripts of a checkout that measure, by name. Knows nothing of what they measure."""

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from askew import checkout
from askew.errors import ConfigError


def listed() -> dict[str, str]:
    """List the checkout's benches, each with what it does. Raises ConfigError outside of a checkout."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_folder().glob("*.py"))}
    return {name: _does(text) for name, text in found.items() if "__main__" in text}


def run(name: str, options: Sequence[str]) -> int:
    """Run a bench in the checkout; returns its exit code. Raises ConfigError when there is no such bench."""
    if name not in (known := listed()):
        raise ConfigError(f"a bench: {', '.join(known)}", repr(name), "name one of these")
    folder = _folder()
    return subprocess.run([sys.executable, str(folder / f"{name}.py"), *options], cwd=folder.parent).returncode


def _folder() -> Path:
    return checkout.find() / "bench"


def _does(text: str) -> str:
    """The first sentence of a script's docstring."""
    return (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")

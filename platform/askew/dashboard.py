"""The border to a Ray cluster's dashboard: what its REST API is asked, and the words when it does not answer.

Knows nothing of what is asked.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from askew.errors import MachineError, StageError
from askew.ports import Ports

DEFAULT = Ports().url("dashboard")
START = "start one (make demo), or give its dashboard's address as --address"


def headers() -> dict[str, str]:
    """What a request carries where Ray asks for a token: it is found where Ray's own commands find it."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and path.is_file():
        token = path.read_text(encoding="utf-8").strip()
    return {"authorization": f"Bearer {token}"} if token else {}


def ask(address: str, path: str, timeout_s: float = 30) -> Any:
    """Ask a dashboard for what stands at a path, as JSON. Raises MachineError when it does not answer."""
    return answered(address, "GET", path, timeout_s=timeout_s).json()


def answered(
    address: str, method: str, path: str, values: Mapping[str, Any] | None = None, timeout_s: float = 30
) -> httpx.Response:
    """Send a request; returns the answer, which is one of success.

    Raises MachineError when no dashboard answers at `address`, StageError when what was sent is refused.
    """
    wanted = f"a Ray cluster's dashboard at {address}"
    try:
        answer = httpx.request(
            method, f"{address.rstrip('/')}{path}", json=values, headers=headers(), timeout=timeout_s
        )
    except (httpx.HTTPError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise MachineError(wanted, f"{type(error).__name__}: {error}", START) from error
    if answer.is_success and "json" in answer.headers.get("content-type", "json"):
        return answer
    told = " ".join(answer.text.split())[:600]
    if answer.status_code == 400 or values is not None:
        raise StageError(f"{method} {path} to be accepted", told or f"HTTP {answer.status_code}", "mend that")
    do = "look at its token (RAY_AUTH_TOKEN)" if answer.status_code in (401, 403) else START
    raise MachineError(wanted, f"an answer of HTTP {answer.status_code}", do)

"""Admission: which requests are let in, by the key that they show; what answers those that are not.

Knows the paths by what they need, and nothing of what they do.
"""

import math
from typing import Any

from fastapi import FastAPI, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from askew import keys
from askew.keys import Held, Keys
from askew.refusals import failed

HOOK = "/hooks/mlflow"  # which has a signature of its own
OPEN = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", HOOK)
PAGE, WRITES = "/page/", "/items:"
HELD = "askew.key"  # in the scope of a request: the key that let it in
CHALLENGE = 'Bearer realm="askew"'
SCHEME = {"type": "http", "scheme": "bearer", "description": "a key of this endpoint; see docs/security.md"}


def needed(path: str) -> keys.Scope | None:
    """Tell which scope a key must have for a path; None where no key is wanted."""
    if path in OPEN or path.startswith(PAGE):
        return None
    return "write" if path.startswith(WRITES) else "search"


class Admission:
    """Turns away what shows no key that is good for its path, before anything else is read of it."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        wanted = needed(_path(scope)) if scope["type"] == "http" else None
        refusal = await self._refusal(scope, wanted) if wanted else None
        await (refusal or self._app)(scope, receive, send)

    async def _refusal(self, scope: Scope, wanted: keys.Scope) -> Response | None:
        if not (shown := _shown(scope)):
            return _unknown("this endpoint wants a key, and none was sent")
        if (held := await self._keys.find(shown)) is None:
            return _unknown("no such key", "invalid_token")
        if held.key.expired:
            return _unknown(f"the key {held.key.name} has expired", "invalid_token")
        if wanted not in held.key.scopes:
            return _not_for(held, wanted)
        if held.bucket and (wait_s := held.bucket.take()):
            told = f"more than {held.key.rate:g} requests a second by the key {held.key.name}"
            return failed(429, told, headers={"retry-after": str(math.ceil(wait_s))})
        scope[HELD] = held
        return None


def owe(scope: Scope, count: int) -> None:
    """Count a request as more than one: later ones by its key wait for it."""
    held: Held | None = scope.get(HELD)
    if held and held.bucket:
        held.bucket.owe(count)


def describe(app: FastAPI) -> None:
    """Tell of keys on the application's page: which paths want one, and of which scope."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        schema = plain()  # made once, and kept
        if "securitySchemes" not in schema["components"]:
            schema["components"]["securitySchemes"] = {"key": SCHEME}
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    _describe(operation, needed(path))
        return schema

    app.openapi = described  # type: ignore[method-assign]


def _describe(operation: dict[str, Any], wanted: keys.Scope | None) -> None:
    if wanted:
        operation["security"] = [{"key": []}]
        operation["description"] += f" Wants a key of the scope `{wanted}`."


def _unknown(message: str, error: str = "") -> Response:
    challenge = f'{CHALLENGE}, error="{error}"' if error else CHALLENGE
    return failed(401, message, headers={"www-authenticate": challenge})


def _not_for(held: Held, wanted: keys.Scope) -> Response:
    challenge = f'{CHALLENGE}, error="insufficient_scope", scope="{wanted}"'
    told = f"the key {held.key.name} has no scope {wanted}"
    return failed(403, told, hint="ask for a key that has it", headers={"www-authenticate": challenge})


def _shown(scope: Scope) -> bytes:
    """The key that a request shows, as it came; empty where it shows none."""
    sent: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    kind, _, key = sent.partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else b""


def _path(scope: Scope) -> str:
    """The path below where the application stands: as its router takes it."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "")
    return path[len(root) :] if root and path.startswith(root + "/") else path

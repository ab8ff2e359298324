"""Refusals: what is turned away before anything is asked, and how an error of the endpoint reads.

A request that is not understood gets a 4xx of the form {"error": {"code", "message", "param", "hint"}}. Knows
nothing of paths, or of what is searched.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from askew.errors import DataError
from askew.messages import Failure, Problem

MAX_BODY_BYTES, BODY_TIMEOUT_S = 64 * 1024, 5.0
MAX_ITEMS_BYTES, ITEMS_TIMEOUT_S = 32 << 20, 30.0
SEARCHES = ("/search", "/search/batch", "/similar")
CODES = {
    400: "bad_json", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    408: "body_too_slow", 413: "body_too_large", 415: "wrong_content_type", 422: "invalid_field",
    429: "too_many_requests", 500: "internal", 503: "unavailable",
}  # fmt: skip
HINTS = {
    400: "send one JSON object, encoded in UTF-8",
    401: "send the header Authorization: Bearer, and a key that counts",
    404: "see /docs for the paths",
    405: "see /docs for the methods",
    408: "send the whole body at once",
    413: f"send at most {MAX_BODY_BYTES:,} bytes, or {MAX_ITEMS_BYTES:,} of items",
    415: "set the header content-type: application/json",
    422: "see /docs for the fields and their bounds",
    429: "try again after the seconds in the header Retry-After",
    500: "report it with the header x-request-id",
    503: "try again after the seconds in the header Retry-After",
}


class UnavailableError(Exception):
    """Nothing that could answer answered in time."""


class MissingError(Exception):
    """There is no such product, or whatever `param` asked for."""

    def __init__(self, message: str, param: str = "item_id") -> None:
        super().__init__(message)
        self.param = param


class ForbiddenError(Exception):
    """This is not allowed here; `do` would change that."""

    def __init__(self, message: str, do: str) -> None:
        super().__init__(message)
        self.do = do


class RefusedError(Exception):
    """A change does not fit the index."""


def add_to(app: FastAPI, busy: Callable[[], bool]) -> None:
    """Let an application refuse what is too large, or too much, and tell its errors in one form."""
    app.add_middleware(Bounds, busy=busy)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)


async def answer(request: Request, error: Exception) -> Response:
    """Answer an error in the form of all; raises it if it is none that a request can be blamed for."""
    handler = next((HANDLERS[kind] for kind in type(error).__mro__[:-3] if kind in HANDLERS), None)
    if handler is None:
        raise error
    return await handler(request, error)


def failed(
    status: int, message: str, param: str | None = None, hint: str = "", headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Make the answer of an error."""
    hint = hint or HINTS.get(status, "see /docs")
    problem = Problem(code=CODES.get(status, "error"), message=message, param=param, hint=hint)
    headers = {"retry-after": "1"} if status == 503 else dict(headers or {})
    if status in (408, 413, 500):  # the server closes the connection after these
        headers["connection"] = "close"
    return JSONResponse(Failure(error=problem).model_dump(), status, headers)


FULL = failed(503, "too many searches at once")  # made once: there is no time for it when it is sent


class Bounds:
    """Refuses a body that is too large, too slow or no JSON, before anything parses it; while busy, any search."""

    def __init__(self, app: ASGIApp, busy: Callable[[], bool]) -> None:
        self._app, self._busy = app, busy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body within the bounds, then pass it on."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        if scope["path"] in SEARCHES and self._busy():
            await FULL(scope, receive, send)
            return
        items = scope["path"].startswith("/items:")
        most, within_s = (MAX_ITEMS_BYTES, ITEMS_TIMEOUT_S) if items else (MAX_BODY_BYTES, BODY_TIMEOUT_S)
        kind = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip().lower()
        try:
            if kind != b"application/json":
                raise HTTPException(415, f"wanted content-type application/json; found {kind.decode('latin-1')!r}")
            async with asyncio.timeout(within_s):
                body = await _body(receive, most)
        except TimeoutError:
            await failed(408, f"the body did not arrive within {within_s:.0f} s")(scope, receive, send)
        except HTTPException as error:
            await failed(error.status_code, error.detail)(scope, receive, send)
        else:
            messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Message:
                return messages.pop() if messages else await receive()

            await self._app(scope, replay, send)


async def _body(receive: Receive, most: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "the client hung up")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > most:
            raise HTTPException(413, f"the body has more than {most:,} bytes")
    return b"".join(parts)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = failed(error.status_code, str(error.detail))
    response.headers.update(error.headers or {})  # a 405 names the methods allowed
    return response


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return failed(400, f"the body is not JSON: {first['ctx']['error']}")
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return failed(422, first["msg"], param and param.encode("utf-8", "backslashreplace").decode())


async def _on_unavailable(request: Request, error: Exception) -> Response:
    return failed(503, str(error))


async def _on_missing(request: Request, error: Exception) -> Response:
    assert isinstance(error, MissingError)
    return failed(404, str(error), error.param)


async def _on_forbidden(request: Request, error: Exception) -> Response:
    assert isinstance(error, ForbiddenError)
    return failed(403, str(error), hint=error.do)


async def _on_refused(request: Request, error: Exception) -> Response:
    return failed(422, str(error), "items")


async def _on_filter(request: Request, error: Exception) -> Response:
    return failed(422, str(error), "filter")


async def _on_bug(request: Request, error: Exception) -> Response:
    return failed(500, f"{type(error).__name__}")


HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    HTTPException: _on_http, RequestValidationError: _on_invalid, UnavailableError: _on_unavailable,
    MissingError: _on_missing, ForbiddenError: _on_forbidden, RefusedError: _on_refused, DataError: _on_filter,
    Exception: _on_bug,
}  # fmt: skip

"""The search page at the endpoint's `/`: three static files, which ask the endpoint's own paths and nothing else.

What a browser may load for it is named in its content security policy: nothing from elsewhere, no inline script.
"""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Response

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}  # fmt: skip
PARTS = {
    "/": ("index.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/script.js": ("script.js", "text/javascript"),
}


def add_to(app: FastAPI) -> None:
    """Let an application serve the page."""
    for path, (name, kind) in PARTS.items():
        content = files("askew").joinpath("static", name).read_bytes()
        app.add_api_route(path, _sending(content, kind), methods=["GET"], include_in_schema=False)


def _sending(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send

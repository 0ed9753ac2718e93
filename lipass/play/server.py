"""The web application: one page, one socket a visitor, and what keeps strangers out.

A page of another site cannot open the socket (its origin is compared with the host it asks for),
and a name that points to this machine from elsewhere cannot either (on loopback only loopback's
names are answered). Beyond loopback a token is asked for. Nothing that a visitor sends names a
file, and nothing is executed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from importlib.resources import files
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from lipass.play.connection import Connection, Limits
from lipass.play.host import Host, Status

log = logging.getLogger(__name__)

_SCRIPTS = ("page.js", "film.js", "keys.js", "charts.js", "record.js", "voice.js", "ear.js")
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}": (name, "text/javascript") for name in _SCRIPTS},
}
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    return host in _LOOPBACK


def application(
    host: Host, *, token: str = "", loopback: bool = True, limits: Limits | None = None
) -> Starlette:
    """Build the application that serves a host.

    Args:
        host: the world; started and closed with the application.
        token: what a visitor has to know; "" lets everybody in.
        loopback: whether only names of this machine are answered.
        limits: of a connection.
    """
    connections: set[Connection] = set()
    bounds = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def tell(status: Status) -> None:
            def to_all() -> None:
                for connection in tuple(connections):
                    connection.status(status)

            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(to_all)

        host.tell = tell
        host.start()
        yield
        await asyncio.to_thread(host.close)

    async def page(request: Request) -> Response:
        if why := _refusal(request, loopback):
            return PlainTextResponse(why, 403, headers=_HEADERS)
        name, kind = _PAGE[request.url.path]
        text = (files("lipass.play") / "page" / name).read_text(encoding="utf-8")
        policy = (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return Response(
            text, media_type=kind, headers={**_HEADERS, "Content-Security-Policy": policy}
        )

    async def socket(websocket: WebSocket) -> None:
        if why := _refusal(websocket, loopback) or _foreign(websocket):
            log.info("a socket was refused: %s", why)
            await websocket.close(1008, why)  # before it is accepted: an answer 403
            return
        await websocket.accept()
        connection = Connection(websocket, host, bounds, lambda given: _knows(given, token))
        connections.add(connection)
        try:
            await connection.run()
        finally:
            connections.discard(connection)

    async def film(request: Request) -> Response:
        if why := _refusal(request, loopback):
            return PlainTextResponse(why, 403, headers=_HEADERS)
        found = host.films.take(request.path_params["ticket"]) if host.films else None
        if found is None:
            why = "a film is fetched once, and waits for a short while"
            return PlainTextResponse(why, 404, headers=_HEADERS)
        named = {"Content-Disposition": 'attachment; filename="walk.mp4"'}
        return Response(found, media_type="video/mp4", headers=_HEADERS | named)

    routes = [*(Route(path, page) for path in _PAGE), Route("/film/{ticket}", film)]
    return Starlette(routes=[*routes, WebSocketRoute("/socket", socket)], lifespan=lifespan)


def _knows(given: str, token: str) -> bool:
    return not token or hmac.compare_digest(given.encode(), token.encode())


def _refusal(connection: HTTPConnection, loopback: bool) -> str | None:
    """Say why a host name is not answered: another site's name may point here."""
    name = urlsplit(f"//{connection.headers.get('host', '')}").hostname
    if loopback and name not in ("127.0.0.1", "localhost", "::1"):
        return "this server answers to names of this machine only"
    return None


def _foreign(connection: HTTPConnection) -> str | None:
    """Say why an origin may not open the socket: it is not the page that this server gave."""
    origin = urlsplit(connection.headers.get("origin", ""))
    if origin.scheme not in ("http", "https") or origin.netloc != connection.headers.get("host"):
        return "the socket is open to its own page only"
    return None

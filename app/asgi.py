"""What the API and the inference server do alike with any request, below FastAPI: plain ASGI."""

from anyio import CancelScope
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RequestNormalizer:
    """Middleware that answers HEAD like GET, without the body, and serves a path with a trailing slash as without it.

    It stands in front of every other middleware, so that they all see one path and one method.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _without_trailing_slash(scope)
        if scope["method"] == "HEAD":
            await _answer_head(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _without_trailing_slash(scope: Scope) -> Scope:
    path: str = scope["path"]
    raw: bytes = scope.get("raw_path") or path.encode()
    if path == "/" or not raw.endswith(b"/"):  # an escaped slash belongs to a name
        return scope
    return {**scope, "path": path[:-1], "raw_path": raw[:-1]}


async def _answer_head(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Send what GET would begin with, and stop the route there: its body may be a stream without an end."""
    with CancelScope() as route:

        async def send_start(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                route.cancel()

        await app({**scope, "method": "GET"}, receive, send_start)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return once the client has closed its connection. The request's body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass

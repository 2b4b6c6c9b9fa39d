"""A thread-safe httpx transport. Each connection serves one request at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, LifoQueue

import httpx

SocketOption = tuple[int, int, int]


class ExclusiveTransport(httpx.BaseTransport):
    """At most `connections` connections to a server. A request closes no connection except its own.

    httpcore's pool may close an idle connection that it has just assigned to another thread. That thread then reads
    from a closed descriptor (encode/httpcore issue 1110). So each connection has its own pool here. A request takes
    one from a queue and puts it back when its response is closed.

    A connection that was idle for longer than `idle_seconds` is replaced when a request takes it. A busy server may
    close an idle connection just as a request arrives on it. Such a request is sent once more, on a new connection.
    """

    def __init__(self, connections: int, idle_seconds: float, socket_options: Iterable[SocketOption] = ()) -> None:
        self._limits = httpx.Limits(max_connections=1, keepalive_expiry=idle_seconds)
        self._socket_options = list(socket_options)
        self._tls = httpx.create_ssl_context(
            trust_env=False
        )  # shared: reading the certificates takes longer than a request
        self._closed = False
        self._free: LifoQueue[httpx.HTTPTransport | None] = LifoQueue()
        for _ in range(connections):
            self._free.put(None)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        free = self._take(request)
        transport = free or self._open()
        try:
            response = _send(transport, request, is_reused=free is not None)
        except BaseException:
            self._put_back(transport)
            raise
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _ReturningStream(response.stream, lambda: self._put_back(transport))
        return response

    def close(self) -> None:
        """Closes the free connections now, and each busy one when its response is closed."""
        self._closed = True
        with suppress(Empty):
            while True:
                if transport := self._free.get_nowait():
                    transport.close()

    def _take(self, request: httpx.Request) -> httpx.HTTPTransport | None:
        """A free connection, or None for one that is not open yet."""
        try:
            return self._free.get(timeout=request.extensions.get("timeout", {}).get("pool"))
        except Empty:
            raise httpx.PoolTimeout("all connections are in use", request=request) from None

    def _open(self) -> httpx.HTTPTransport:
        return httpx.HTTPTransport(
            verify=self._tls, trust_env=False, limits=self._limits, socket_options=self._socket_options
        )

    def _put_back(self, transport: httpx.HTTPTransport) -> None:
        if self._closed:
            transport.close()
        else:
            self._free.put(transport)


def _send(transport: httpx.HTTPTransport, request: httpx.Request, *, is_reused: bool) -> httpx.Response:
    try:
        return transport.handle_request(request)
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
        if not is_reused:
            raise
        return transport.handle_request(request)  # its pool has dropped the closed connection


class _ReturningStream(httpx.SyncByteStream):
    """A response's byte stream. It calls `give_back` once, when it is closed."""

    def __init__(self, stream: httpx.SyncByteStream, give_back: Callable[[], None]) -> None:
        self._stream = stream
        self._give_back: Callable[[], None] | None = give_back

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:  # noqa: UP028 - `yield from` would close the connection with an iterator over it
            yield chunk

    def close(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is None:
            return
        try:
            self._stream.close()
        finally:
            give_back()

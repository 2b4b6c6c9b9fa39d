"""Protection against cross-site request forgery: a page of another site must not write here through a browser.

A browser sends a form or a POST without a body to any address, without a CORS preflight. A service without a key cannot
distinguish such a request from one of its owner. But the browser sends the origin in `Origin` and `Sec-Fetch-Site`, and
no page can set these headers. Clients other than browsers send neither.
See https://cheatsheetseries.owasp.org/cheatsheets/Cross-Site_Request_Forgery_Prevention_Cheat_Sheet.html.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing (RFC 9110, 9.2.1)."""

_DEFAULT_PORTS = (":80", ":443")


def foreign_origin(method: str, headers: Headers, allowed_hosts: Collection[str]) -> str | None:
    """Return the other site whose page sent a writing request, or None if there is none.

    A page is our own if its `Origin` has the host and port of the request's `Host`, or a host in `allowed_hosts`. The
    operator sets `allowed_hosts` because a proxy may put another name into `Host`.
    """
    if method in SAFE_METHODS:
        return None
    origin = headers.get("origin")
    if origin is not None and not _is_ours(origin.strip().lower(), headers.get("host", "").lower(), allowed_hosts):
        return origin or "another site"
    return "another site" if headers.get("sec-fetch-site", "").strip().lower() == "cross-site" else None


def _is_ours(origin: str, host: str, allowed_hosts: Collection[str]) -> bool:
    try:
        parts = urlsplit(origin)
        name = parts.hostname
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not name:
        return False
    return _without_default_port(parts.netloc) == _without_default_port(host) or name in allowed_hosts


def _without_default_port(authority: str) -> str:
    for port in _DEFAULT_PORTS:
        authority = authority.removesuffix(port)
    return authority

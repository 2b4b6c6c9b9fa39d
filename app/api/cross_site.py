"""Cross-site request forgery: a page of another site must not change anything here through its visitor's browser.

A browser sends a form or a body-less POST to any address without asking that address first (no CORS preflight), and a
service without a key cannot tell such a request from its owner's. But the browser says where it comes from: in `Origin`
and in `Sec-Fetch-Site`, which no page can set. Clients that are no browsers send neither.
See https://cheatsheetseries.owasp.org/cheatsheets/Cross-Site_Request_Forgery_Prevention_Cheat_Sheet.html.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing (RFC 9110, 9.2.1)."""

_DEFAULT_PORTS = (":80", ":443")


def foreign_origin(method: str, headers: Headers, allowed_hosts: Collection[str]) -> str | None:
    """The site whose page sends a request that could change something; None where there is no such page.

    A page is our own when its `Origin` has the host and port that the request is for, or a host that the operator
    allows (`allowed_hosts`: a proxy may put another name into `Host`).
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

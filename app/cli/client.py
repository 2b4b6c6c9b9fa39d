"""A client of the running service, for commands that ask it like anybody else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from app.settings import LOOPBACK, Settings


class RequestError(Exception):
    """The service did not do what it was asked; why, in its own words."""


@contextmanager
def client_of(settings: Settings, seconds: float = 600) -> Iterator[httpx.Client]:
    """A client with this deployment's address and key, which waits `seconds` for an answer."""
    host = settings.host if settings.host in LOOPBACK else "127.0.0.1"
    key = {"Authorization": f"Bearer {settings.key.get_secret_value()}"} if settings.key else {}
    url = f"http://{host}:{settings.port}"
    with httpx.Client(base_url=url, headers=key, timeout=seconds, trust_env=False) as client:
        yield client


def ok(response: httpx.Response) -> dict[str, Any]:
    """The answer; RequestError when it is a problem."""
    answer: dict[str, Any] = response.json()
    if not response.is_success:
        raise RequestError(f"{response.request.method} {response.request.url.path}: {answer.get('detail', answer)}")
    return answer


def get(client: httpx.Client, path: str) -> dict[str, Any]:
    return ok(client.get(path))

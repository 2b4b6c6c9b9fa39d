"""The commands' HTTP client of the running service."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from app.cli.errors import CommandError
from app.settings import Settings


@contextmanager
def client_of(settings: Settings, seconds: float = 600) -> Iterator[httpx.Client]:
    """A client with this deployment's address and key, and a timeout of `seconds`. Raises CommandError."""
    key = {"Authorization": f"Bearer {settings.key.get_secret_value()}"} if settings.key else {}
    url = settings.api_url
    with httpx.Client(base_url=url, headers=key, timeout=seconds, trust_env=False) as client:
        try:
            yield client
        except httpx.TransportError:
            raise CommandError(f"no service answers at {url}; start it with `veritune up`") from None


def ok(response: httpx.Response) -> dict[str, Any]:
    """Return the response's JSON. Raises CommandError with the service's `detail` if the request failed."""
    answer: dict[str, Any] = response.json()
    if not response.is_success:
        raise CommandError(f"{response.request.method} {response.request.url.path}: {answer.get('detail', answer)}")
    return answer


def get(client: httpx.Client, path: str) -> dict[str, Any]:
    return ok(client.get(path))

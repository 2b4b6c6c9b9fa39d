"""Every test of a service runs on both databases."""

import pytest


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """None is SQLite under the deployment's home."""
    return None if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))

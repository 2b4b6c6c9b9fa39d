"""docker-compose.yml as the engine would read it: variables filled in, `$$` undone, commands as lists."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from tests.conftest import ROOT

FILE = ROOT / "docker-compose.yml"
SECRETS = {
    "VERITUNE_API_KEY": "a key of this test",
    "VERITUNE_INFERENCE_SECRET": "a secret of this test",
    "POSTGRES_PASSWORD": "secretOfThisTest",
}

_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:[?-])([^}]*))?\})")


class MissingVariable(Exception):
    """A `${NAME:?message}` whose variable is not set."""


@dataclass(frozen=True, slots=True)
class Service:
    """One service. `healthcheck` is what the engine runs in its container; a shell's is led by `sh -c`."""

    name: str
    command: list[str]
    environment: dict[str, str]
    healthcheck: list[str] | None
    document: dict[str, Any]


def read_services(variables: Mapping[str, str]) -> dict[str, Service]:
    """Every service by its name. Raises MissingVariable."""
    document = _filled(yaml.safe_load(FILE.read_text("utf-8")), variables)
    return {name: _service(name, service) for name, service in document["services"].items()}


def _service(name: str, document: dict[str, Any]) -> Service:
    test = document.get("healthcheck", {}).get("test")
    return Service(
        name=name,
        command=document.get("command", []),
        environment=document.get("environment", {}),
        healthcheck=None if test is None else {"CMD": [], "CMD-SHELL": ["sh", "-c"]}[test[0]] + test[1:],
        document=document,
    )


def _filled(node: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _filled(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, variables) for value in node]
    return _VARIABLE.sub(lambda found: _value(found, variables), node) if isinstance(node, str) else node


def _value(found: re.Match[str], variables: Mapping[str, str]) -> str:
    escaped, name, rule, text = found.groups()
    if escaped:
        return "$"
    value = variables.get(name, "")
    if not value and rule == ":?":
        raise MissingVariable(f"{name}: {text}")
    return value or (text or "")

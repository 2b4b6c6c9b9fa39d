"""`veritune models`: the base models of this deployment. The heavy part runs in `python -m worker.models`."""

import json
import subprocess
import sys

from app.composition import Services
from app.domain.base_models import BaseModelDescription


class ModelCommandError(Exception):
    """What `python -m worker.models` said went wrong, and the way out."""


def fetch(services: Services, name: str) -> BaseModelDescription:
    """Get a model of the catalogue, convert it once, list it."""
    return _register(services, ["fetch", name])


def add(services: Services, name: str, source: str) -> BaseModelDescription:
    """List a local directory, or ORG/NAME@REVISION of the hub."""
    return _register(services, ["add", name, source])


def fetch_default(services: Services) -> BaseModelDescription:
    return fetch(services, services.settings.default_base_model)


def _register(services: Services, arguments: list[str]) -> BaseModelDescription:
    command = [sys.executable, "-m", "worker.models", *arguments]
    command += ["--cache", str(services.settings.cache_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    line = (done.stdout.strip().splitlines() or ["{}"])[-1]
    if done.returncode != 0:
        error = json.loads(line).get("error") if line.startswith("{") else None
        told = error or {
            "message": f"python -m worker.models ended with status {done.returncode}",
            "hint": None,
        }
        raise ModelCommandError(f"{told['message']}; {told['hint']}" if told["hint"] else told["message"])
    described = BaseModelDescription.model_validate_json(line)
    services.base_models.register(described)
    return described

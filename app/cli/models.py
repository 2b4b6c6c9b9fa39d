"""`veritune models`: the base models of this deployment. `python -m worker.models` does the work with tensors."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from app.cli.errors import CommandError
from app.composition import Services
from app.domain.base_models import BaseModelDescription, ExportedBase
from app.domain.model_catalogue import FETCHABLE_MODELS, SMALL_BASE_MODEL
from app.domain.tuning_methods import Quantization


def fetch(services: Services, name: str) -> BaseModelDescription:
    """Download a model of the catalogue, convert it once, and list it."""
    return _register(services, ["fetch", name])


def add(services: Services, name: str, source: str) -> BaseModelDescription:
    """List a model from a local directory or GGUF file, or from ORG/NAME@REVISION of the Hugging Face hub."""
    return _register(services, ["add", name, source])


def ensure_default(services: Services, say: Callable[[str], None]) -> str:
    """The name of the model for jobs that name none: the default, fetched if it is missing.

    A deployment that lists only models of its own downloads nothing unasked. If the default cannot be downloaded, the
    small one takes its place. Raises CommandError if no model is listed then.
    """
    settings = services.settings
    default, is_asked = settings.default_base_model, "default_base_model" in settings.model_fields_set
    listed = {model.name for model in services.base_models.list_base_models()}
    if default in listed or (listed and not is_asked and SMALL_BASE_MODEL not in listed):
        return default
    say(f"fetching the base model {default}")
    try:
        return fetch(services, default).name
    except CommandError as failed:
        if default not in FETCHABLE_MODELS or default == SMALL_BASE_MODEL:
            if not listed:
                raise
            say(f"{failed}; jobs have to name one of: {', '.join(sorted(listed))}")
            return default
        say(f"{failed}; going on with {SMALL_BASE_MODEL}")
    return SMALL_BASE_MODEL if SMALL_BASE_MODEL in listed else fetch(services, SMALL_BASE_MODEL).name


def export(services: Services, name: str, quantization: Quantization | None, to: Path) -> ExportedBase:
    """Export a listed model as it is served at one quantisation, and its adapters to where vLLM looks for them."""
    described = services.base_models.describe(services.base_models.get(name))
    arguments = ["export", described.source.model_dump_json(), "--name", described.name, "--digest", described.digest]
    arguments += ["--quantization", quantization.model_dump_json() if quantization else "null", "--to", str(to)]
    exported = ExportedBase.model_validate_json(_result_line(services, arguments))
    services.adapters.put_on_disk(exported.digest)
    return exported


def _register(services: Services, arguments: list[str]) -> BaseModelDescription:
    described = BaseModelDescription.model_validate_json(_result_line(services, arguments))
    services.base_models.register(described)
    return described


def _result_line(services: Services, arguments: list[str]) -> str:
    """The result line of `python -m worker.models`. Raises CommandError with its error message."""
    command = [sys.executable, "-m", "worker.models", *arguments]
    command += ["--cache", str(services.settings.cache_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    line = (done.stdout.strip().splitlines() or ["{}"])[-1]
    if done.returncode != 0:
        error = json.loads(line).get("error") if line.startswith("{") else None
        failure = error or {
            "message": f"python -m worker.models ended with status {done.returncode}",
            "hint": None,
        }
        raise CommandError(f"{failure['message']}; {failure['hint']}" if failure["hint"] else failure["message"])
    return line

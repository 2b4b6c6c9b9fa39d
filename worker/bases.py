"""A base model's weights on this host: in the cache by digest, or fetched into it by `python -m worker.models`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from app.domain.base_models import BaseModelDescription
from app.domain.errors import UnavailableError


def ensure_base(described: BaseModelDescription, cache: Path) -> Path:
    """The directory with config.json, tokenizer.json and safetensors. Raises UnavailableError (`base_missing`)."""
    target = cache / "models" / described.digest
    if target.is_dir():
        return target
    command = [sys.executable, "-m", "worker.models", "ensure", described.source.model_dump_json()]
    command += ["--name", described.name, "--digest", described.digest, "--cache", str(cache)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    answer = _last_line(done.stdout)
    if done.returncode != 0 or "path" not in answer:
        error = answer.get("error") or {"message": f"exit status {done.returncode}"}
        raise UnavailableError(
            f"the weights of {described.name} cannot be fetched to this host: {error['message']}",
            code="base_missing",
        )
    return Path(answer["path"])


def _last_line(text: str) -> dict[str, Any]:
    lines = text.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}

"""Adapters: published weights, and the manifest that says how they were trained."""

import hashlib
import json
from datetime import datetime
from typing import Any, Literal

from app.domain.base_models import served_base_digest
from app.domain.calibration import Calibration
from app.domain.frozen import Frozen
from app.domain.spec_base import Name
from app.domain.tuning_methods import Quantization

AdapterKind = Literal["peft", "full"]
WEIGHTS_FILE: dict[AdapterKind, str] = {"peft": "adapter_model.safetensors", "full": "model.safetensors"}
CONFIG_FILE: dict[AdapterKind, str] = {"peft": "adapter_config.json", "full": "config.json"}
"""The weights and the config in an adapter's directory. The digest is computed from these two files."""

EXTRA_FILES: dict[AdapterKind, tuple[str, ...]] = {
    "peft": (),
    "full": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
}
"""Further files in the directory, if the base model has them."""

MANIFEST_FILE = "manifest.json"
MODEL_CARD_FILE = "README.md"


class ManifestBase(Frozen):
    name: str
    revision: str
    digest: str


class Environment(Frozen):
    """Where the training ran. Another device, number format or number of threads may change the last bits of a sum."""

    device: str
    precision: str
    threads: int


class Manifest(Frozen):
    """Everything needed to repeat the run that produced an adapter. It never changes. The digest leaves it out.

    `environment` is null in manifests of versions that did not record it.
    """

    schema_version: Literal[1] = 1
    job_id: str
    kind: AdapterKind
    base: ManifestBase
    quantization: dict[str, Any] | None
    spec: dict[str, Any]
    dataset_digest: str
    dataset_rows: int
    protected_share: float
    format: dict[str, Any]
    max_sequence_length: int
    seed: int
    metrics: dict[str, float]
    warnings: tuple[str, ...] = ()
    packages: dict[str, str]
    environment: Environment | None = None
    code_revision: str
    servable_by: tuple[str, ...]
    created_at: datetime

    @property
    def served_base(self) -> str:
        """Digest of the served base that the adapter was trained on."""
        quantization = self.quantization and Quantization.model_validate(self.quantization)
        return served_base_digest(self.base.digest, quantization or None)


class Adapter(Frozen):
    """An adapter as the API returns it. `aliases` contains `default` if it is the promoted adapter.

    `calibration`: applied to its verdicts' probabilities. None until an evaluation has fitted one.
    """

    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    digest: str
    kind: AdapterKind
    job_id: str | None
    base_model: str
    aliases: tuple[str, ...]
    bytes: int
    manifest: Manifest
    calibration: Calibration | None = None
    created_at: datetime


class PublishRequest(Frozen):
    """How to publish a checkpoint. `name`: unique among adapters; by default made of the job's name and the update."""

    name: Name | None = None


def adapter_digest(weights: str, config: bytes) -> str:
    """SHA-256 of the weights' SHA-256 and the canonical adapter_config.json: equal digests compute the same.

    Canonical: sorted keys, and sorted lists of strings, because PEFT writes module names from an unordered set.
    """
    document = _canonical(json.loads(config))
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(f"{weights}\n{canonical}".encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(member) for key, member in value.items()}
    if isinstance(value, list):
        members = [_canonical(member) for member in value]
        return sorted(members) if all(isinstance(member, str) for member in members) else members
    return value


_USE: dict[AdapterKind, str] = {
    "peft": """Load it with PEFT:

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base, "path/to/this/directory")
```""",
    "full": """It is a whole model; load it with transformers:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```""",
}


def render_model_card(name: str, manifest: Manifest) -> str:
    """README.md beside the weights: what they are, how they were trained, how to load them."""
    loss = manifest.metrics.get("loss")
    trained = f"- final loss: {loss:.4f}\n" if loss is not None else ""
    validation_loss = manifest.metrics.get("validation_loss")
    trained += f"- loss on validation rows: {validation_loss:.4f}\n" if validation_loss is not None else ""
    trained += "".join(f"- **warning**: {warning}\n" for warning in manifest.warnings)
    method = (manifest.spec.get("adapter") or {}).get("type", "full")
    library = {"peft": "peft", "full": "transformers"}[manifest.kind]
    what = {"peft": "adapter", "full": "model"}[manifest.kind]
    return f"""---
base_model: {manifest.base.name}
library_name: {library}
tags: [fact-checking, react, {method}]
---

# {name}

A ReAct (arXiv:2210.03629) fact-checking {what}. It writes Thoughts and chooses Actions (`Search[…]`, `Lookup[…]`,
`Finish[…]`). Observations must come from a search, never from the model.

- base model: {manifest.base.name} at revision {manifest.base.revision}
- tuning method: {method}; quantisation while training: {json.dumps(manifest.quantization)}
- trained on {manifest.dataset_rows} trajectories (dataset digest `{manifest.dataset_digest[:16]}…`)
{trained}- seed: {manifest.seed}, code revision: {manifest.code_revision}

{_USE[manifest.kind]}

The prompt format and its template are in `manifest.json` under `format`. Use exactly this format: the {what} was
trained on no other.
"""

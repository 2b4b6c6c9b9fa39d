"""Adapters: published weights and the manifest of what made them."""

import hashlib
import json
from datetime import datetime
from typing import Any, Literal

from app.domain.base_models import served_base_digest
from app.domain.frozen import Frozen
from app.domain.spec_base import Name
from app.domain.tuning_methods import Quantization

AdapterKind = Literal["peft", "full"]
WEIGHTS_FILE: dict[AdapterKind, str] = {"peft": "adapter_model.safetensors", "full": "model.safetensors"}
CONFIG_FILE: dict[AdapterKind, str] = {"peft": "adapter_config.json", "full": "config.json"}
"""What an adapter's directory computes with: a PEFT adapter's, or a whole model's."""

EXTRA_FILES: dict[AdapterKind, tuple[str, ...]] = {
    "peft": (),
    "full": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
}
"""Files that belong to it too, where its base has them."""

MANIFEST_FILE = "manifest.json"
MODEL_CARD_FILE = "README.md"


class ManifestBase(Frozen):
    name: str
    revision: str
    digest: str


class Environment(Frozen):
    """Where a training ran: another device, number format or count of threads adds up in another order."""

    device: str
    precision: str
    threads: int


class Manifest(Frozen):
    """What produced an adapter: enough to repeat the run. Lies outside the digest and never changes.

    `environment` is null in a manifest of a version that did not note it.
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
        """The digest under which the base is served that this was trained on."""
        held = self.quantization and Quantization.model_validate(self.quantization)
        return served_base_digest(self.base.digest, held or None)


class Adapter(Frozen):
    """An adapter as the API shows it. `aliases` holds `default` when it is the promoted one."""

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
    created_at: datetime


class PublishRequest(Frozen):
    """How to publish a checkpoint. `name`: unique among adapters; made from the job's and the update when left out."""

    name: Name | None = None


def adapter_digest(weights: str, config: bytes) -> str:
    """SHA-256 over the weights' SHA-256 and the canonical adapter_config.json: what the adapter computes, no more.

    Canonical: keys sorted, lists of strings sorted (PEFT writes module names from a set, in any order).
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
    """The README.md beside the weights: what they are, what made them, how to load them."""
    loss = manifest.metrics.get("loss")
    trained = f"- final loss: {loss:.4f}\n" if loss is not None else ""
    held_out = manifest.metrics.get("validation_loss")
    trained += f"- loss on validation rows: {held_out:.4f}\n" if held_out is not None else ""
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

A ReAct fact-checking {what}: it writes Thoughts and chooses Actions (`Search[…]`, `Lookup[…]`, `Finish[…]`); what it
observes must come from a search, never from the model.

- base model: {manifest.base.name} at revision {manifest.base.revision}
- tuning method: {method}; quantisation while training: {json.dumps(manifest.quantization)}
- trained on {manifest.dataset_rows} trajectories (dataset digest `{manifest.dataset_digest[:16]}…`)
{trained}- seed: {manifest.seed}, code revision: {manifest.code_revision}

{_USE[manifest.kind]}

The prompt format and its template are in `manifest.json` under `format`; a prompt of another shape is not what it
was trained on.
"""

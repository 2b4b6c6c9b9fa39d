"""A trained adapter → a PEFT directory whose bytes depend on nothing but the training."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from app.domain.attempts import BaseOnDisk
from worker.training.masters import MasterWeights


def write_adapter(model: PeftModel, masters: MasterWeights, base: BaseOnDisk, directory: Path) -> Path:
    """Write `adapter/` under `directory`, whole or not at all, with the float32 masters; return it."""
    final, partial = directory / "adapter", directory / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_adapter_files(model, masters, base, partial)
    shutil.rmtree(final, ignore_errors=True)
    return partial.rename(final)


def write_adapter_files(model: PeftModel, masters: MasterWeights, base: BaseOnDisk, directory: Path) -> None:
    """Write the adapter's config and its float32 masters into `directory`."""
    _write_config(model, base, directory)
    # Without False, PEFT asks the hub whether the base's vocabulary was resized.
    named: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, state_dict=masters.by_name(), save_embedding_layers=False
    )
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_config(model: PeftModel, base: BaseOnDisk, directory: Path) -> None:
    model.peft_config["default"].save_pretrained(str(directory))
    path = directory / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # By name and revision: a path would mean nothing elsewhere and would change the digest.
    config |= {"base_model_name_or_path": f"{base.name}@{base.revision}", "inference_mode": True}
    canonical = {key: sorted(v) if isinstance(v, list) else v for key, v in config.items()}
    path.write_text(json.dumps(canonical, indent=2, sort_keys=True) + "\n", encoding="utf-8")

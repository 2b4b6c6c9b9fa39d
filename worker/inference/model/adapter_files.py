"""Reads an adapter's PEFT directory, and refuses what cannot be served."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file

from worker.inference.errors import ModelError

CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga")
"""LoRA initialisers that change the base's own weights, which all other adapters share."""

SERVED_KINDS = ("LORA", "IA3", "ADAPTION_PROMPT")


def read_adapter_config(digest: str, directory: Path, max_rank: int) -> PeftConfig:
    """The configuration of an adapter that this engine can serve. Raises ModelError."""
    try:
        raw: dict[str, Any] = json.loads((directory / "adapter_config.json").read_bytes())
        kind = raw.get("peft_type")
        config: Any = PeftConfig.from_pretrained(str(directory)) if kind in SERVED_KINDS else None
    except Exception as error:
        raise ModelError(f"adapter {digest} has no readable adapter_config.json") from error
    if config is None:
        raise ModelError(f"adapter {digest} is of type {kind}; this engine serves {', '.join(SERVED_KINDS)}")
    if isinstance(config, LoraConfig):
        _check_lora(digest, config, max_rank)
    config.inference_mode = True
    checked: PeftConfig = config
    return checked


def _check_lora(digest: str, config: LoraConfig, max_rank: int) -> None:
    initialiser: Any = config.init_lora_weights
    if isinstance(initialiser, str) and initialiser.lower().startswith(CHANGES_THE_BASE):
        raise ModelError(f"adapter {digest} was initialised by {initialiser}: convert it to plain LoRA first")
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if not all(isinstance(rank, int) for rank in ranks):
        raise ModelError(f"adapter {digest} has a rank that is no whole number")
    rank = max(ranks)
    if rank > max_rank:
        raise ModelError(f"adapter {digest} has rank {rank}; at most {max_rank} is served")


def read_adapter_weights(digest: str, directory: Path) -> dict[str, torch.Tensor]:
    """An adapter's weights by PEFT's names, all finite. Raises ModelError."""
    try:
        weights = load_file(directory / "adapter_model.safetensors")
    except Exception as error:
        raise ModelError(f"adapter {digest} has no readable adapter_model.safetensors") from error
    if bad := [key for key, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]:
        raise ModelError(f"adapter {digest} holds NaN or infinite weights, first in {bad[0]}")
    return weights

"""What is trained of a base model: an adapter of some kind put into it, or all of its weights. It knows no data.

PEFT puts the adapters in. What it publishes differently from how it trained is in `publishing`.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from app.domain.tuning_methods import AdaloraAdapter, AdapterSpec, AdaptionPromptAdapter, Ia3Adapter, LoraAdapter
from worker.training.errors import TrainingError

CHANGES_THE_BASE = ("pissa", "olora")
"""Initialisers that take what the adapter starts with out of the base's weights."""

WARM_SHARE, SETTLED_SHARE = 10, 3
"""AdaLoRA: the first tenth of the updates keeps every rank, the last third trains those that are left."""


@dataclass(frozen=True, slots=True)
class TuningMethod:
    """`module`: the whole of it; what requires a gradient is trained. `initial`: parameters by name as they began,
    where the base's weights lost what they stand for."""

    module: nn.Module
    initial: dict[str, torch.Tensor] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def apply_tuning_method(model: PreTrainedModel, adapter: AdapterSpec | None, updates: int) -> TuningMethod:
    """`model` with everything frozen but what `adapter` trains, drawn from the global seed; None trains all of it.

    Raises TrainingError where the adapter does not fit the model.
    """
    if adapter is None:
        return TuningMethod(model.requires_grad_(True))
    model.requires_grad_(False)
    _check_targets(model, adapter)
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            adapted: Any = get_peft_model(model, _config(adapter, model, updates))
        except ValueError as error:
            message = f"an adapter of type {adapter.type} does not go into this base model: {error}"
            raise TrainingError("adapter_does_not_fit", message, "use {type: lora}") from error
    changed = isinstance(adapter, LoraAdapter) and adapter.init_lora_weights in CHANGES_THE_BASE
    method = TuningMethod(adapted)
    initial = {name: p.detach().clone() for name, p in method.parameters().items()} if changed else {}
    return TuningMethod(adapted, initial)


def fill(method: TuningMethod, directory: Path) -> None:
    """Give a fresh adapter the weights of the one in `directory`. Raises TrainingError where they do not fit."""
    module: Any = method.module
    weights = load_file(directory / "adapter_model.safetensors")
    wanted = get_peft_model_state_dict(module, save_embedding_layers=False)
    other = {name for name, value in wanted.items() if name not in weights or weights[name].shape != value.shape}
    if other or weights.keys() - wanted.keys():
        raise TrainingError(
            "adapter_does_not_fit",
            f"the weights to start from are not those of this adapter: {len(other)} are missing or of another shape, "
            f"{len(weights.keys() - wanted.keys())} have no place",
            "set adapter to what those weights were trained as",
        )
    set_peft_model_state_dict(module, weights)


def _config(adapter: AdapterSpec, model: PreTrainedModel, updates: int) -> PeftConfig:
    match adapter:
        case LoraAdapter():
            alpha: Any = adapter.scale_alpha  # PEFT asks for an int but only multiplies by it
            return LoraConfig(
                r=adapter.r,
                lora_alpha=alpha,
                lora_dropout=adapter.dropout,
                use_rslora=adapter.use_rslora,
                use_dora=adapter.use_dora,
                init_lora_weights=adapter.init_lora_weights,
                target_modules=_targets(adapter),
                task_type="CAUSAL_LM",
            )
        case AdaloraAdapter():
            alpha = adapter.scale_alpha
            return AdaLoraConfig(
                init_r=adapter.init_r,
                target_r=adapter.target_r,
                lora_alpha=alpha,
                lora_dropout=adapter.dropout,
                target_modules=_targets(adapter),
                tinit=updates // WARM_SHARE,
                tfinal=updates // SETTLED_SHARE,
                total_step=updates,
                task_type="CAUSAL_LM",
            )
        case Ia3Adapter():
            modules, inner = (
                None if names is None else list(names)
                for names in (adapter.target_modules, adapter.feedforward_modules)
            )
            return IA3Config(target_modules=modules, feedforward_modules=inner, task_type="CAUSAL_LM")
        case AdaptionPromptAdapter():
            layers = adapter.adapter_layers or int(model.config.num_hidden_layers)
            return AdaptionPromptConfig(adapter_len=adapter.adapter_len, adapter_layers=layers, task_type="CAUSAL_LM")


def _targets(adapter: LoraAdapter | AdaloraAdapter) -> str | list[str]:
    return adapter.target_modules if isinstance(adapter.target_modules, str) else list(adapter.target_modules)


def _check_targets(model: PreTrainedModel, adapter: AdapterSpec) -> None:
    """PEFT passes over names that match nothing, as long as another one matches, and over too large a rank."""
    asked = getattr(adapter, "target_modules", None) or "all-linear"
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(asked, str):
        untyped: Any = model
        head = untyped.get_output_embeddings()  # which PEFT leaves out
        targets = {name: module for name, module in linear.items() if module is not head}
    else:
        _check_names(linear, asked)
        targets = {name: module for name, module in linear.items() if any(_names(name, target) for target in asked)}
    rank = max(getattr(adapter, "r", 0), getattr(adapter, "init_r", 0))
    narrow = [name for name, module in targets.items() if rank > min(module.in_features, module.out_features)]
    if narrow:
        module = linear[narrow[0]]
        raise TrainingError(
            "rank_too_large",
            f"a rank of {rank} is more than {narrow[0]} has, which is {module.in_features} × {module.out_features}",
            f"use a rank of at most {min(module.in_features, module.out_features)}, or other target_modules",
        )


def _check_names(linear: dict[str, nn.Linear], asked: tuple[str, ...]) -> None:
    unmatched = [target for target in asked if not any(_names(name, target) for name in linear)]
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise TrainingError(
            "target_modules",
            f"adapter.target_modules names nothing in this base model: {', '.join(unmatched)}",
            f"its linear layers are {', '.join(known)}; or leave it out",
        )


def _names(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")

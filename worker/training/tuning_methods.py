"""Applies a tuning method to a base model: an adapter by PEFT, or full fine-tuning. It knows no data.

`publishing` converts those adapters that are published in another form than they are trained in.
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

BASE_CHANGING_INITIALIZERS = ("pissa", "olora")
"""Initialisers of LoRA that subtract the adapter's initial weights from the base's."""

TINIT_DIVISOR, TFINAL_DIVISOR = 10, 3
"""AdaLoRA keeps all ranks in the first tenth of the updates (`tinit`), and drops none in the last third (`tfinal`)."""


@dataclass(frozen=True, slots=True)
class TuningMethod:
    """`module`: the model with its adapter. It trains the parameters that require a gradient.

    `initial_weights`: initial trainable parameters by name, if they were subtracted from the base; else empty."""

    module: nn.Module
    initial_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def apply_tuning_method(model: PreTrainedModel, adapter: AdapterSpec | None, updates: int) -> TuningMethod:
    """Freeze `model` and add `adapter`, whose weights the global seed draws. None: full fine-tuning.

    Raises TrainingError if the adapter does not fit the model.
    """
    if adapter is None:
        return TuningMethod(model.requires_grad_(True))
    model.requires_grad_(False)
    _check_targets(model, adapter)
    with warnings.catch_warnings():
        # PEFT reads a property of transformers by its deprecated name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            adapted: Any = get_peft_model(model, _peft_config(adapter, model, updates))
        except ValueError as error:
            message = f"an adapter of type {adapter.type} does not fit this base model: {error}"
            raise TrainingError("adapter_does_not_fit", message, "use {type: lora}") from error
    method = TuningMethod(adapted)
    if isinstance(adapter, LoraAdapter) and adapter.init_lora_weights in BASE_CHANGING_INITIALIZERS:
        return TuningMethod(adapted, {name: p.detach().clone() for name, p in method.parameters().items()})
    return method


def load_adapter_weights(method: TuningMethod, directory: Path) -> None:
    """Load the weights of the adapter in `directory`. Raises TrainingError if their names or shapes differ."""
    module: Any = method.module
    weights = load_file(directory / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(module, save_embedding_layers=False)
    missing = {name for name, value in expected.items() if name not in weights or weights[name].shape != value.shape}
    unknown = weights.keys() - expected.keys()
    if missing or unknown:
        raise TrainingError(
            "adapter_does_not_fit",
            f"the weights to start from do not fit this adapter: {len(missing)} are missing or have another shape, "
            f"{len(unknown)} are unknown",
            "set adapter to the values that those weights were trained with",
        )
    set_peft_model_state_dict(module, weights)


def _peft_config(adapter: AdapterSpec, model: PreTrainedModel, updates: int) -> PeftConfig:
    match adapter:
        case LoraAdapter():
            alpha: Any = adapter.scale_alpha  # a float: PEFT declares an int, but only multiplies by it
            return LoraConfig(
                r=adapter.r,
                lora_alpha=alpha,
                lora_dropout=adapter.dropout,
                use_rslora=adapter.use_rslora,
                use_dora=adapter.use_dora,
                init_lora_weights=adapter.init_lora_weights,
                target_modules=_target_modules(adapter),
                task_type="CAUSAL_LM",
            )
        case AdaloraAdapter():
            alpha = adapter.scale_alpha
            return AdaLoraConfig(
                init_r=adapter.init_r,
                target_r=adapter.target_r,
                lora_alpha=alpha,
                lora_dropout=adapter.dropout,
                target_modules=_target_modules(adapter),
                tinit=updates // TINIT_DIVISOR,
                tfinal=updates // TFINAL_DIVISOR,
                total_step=updates,
                task_type="CAUSAL_LM",
            )
        case Ia3Adapter():
            modules, feedforward = (
                None if names is None else list(names)
                for names in (adapter.target_modules, adapter.feedforward_modules)
            )
            return IA3Config(target_modules=modules, feedforward_modules=feedforward, task_type="CAUSAL_LM")
        case AdaptionPromptAdapter():
            layers = adapter.adapter_layers or int(model.config.num_hidden_layers)
            return AdaptionPromptConfig(adapter_len=adapter.adapter_len, adapter_layers=layers, task_type="CAUSAL_LM")


def _target_modules(adapter: LoraAdapter | AdaloraAdapter) -> str | list[str]:
    return adapter.target_modules if isinstance(adapter.target_modules, str) else list(adapter.target_modules)


def _check_targets(model: PreTrainedModel, adapter: AdapterSpec) -> None:
    """Raise TrainingError for a name that matches no layer, and for too large a rank. PEFT accepts both."""
    target_modules = getattr(adapter, "target_modules", None) or "all-linear"
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(target_modules, str):
        untyped: Any = model
        head = untyped.get_output_embeddings()  # PEFT's "all-linear" excludes it
        targets = {name: module for name, module in linear.items() if module is not head}
    else:
        _check_names(linear, target_modules)
        targets = {
            name: module for name, module in linear.items() if any(_matches(name, target) for target in target_modules)
        }
    rank = max(getattr(adapter, "r", 0), getattr(adapter, "init_r", 0))
    too_small = [name for name, module in targets.items() if rank > min(module.in_features, module.out_features)]
    if too_small:
        module = linear[too_small[0]]
        raise TrainingError(
            "rank_too_large",
            f"a rank of {rank} is too large for {too_small[0]}, which is {module.in_features} × {module.out_features}",
            f"use a rank of at most {min(module.in_features, module.out_features)}, or other target_modules",
        )


def _check_names(linear: dict[str, nn.Linear], target_modules: tuple[str, ...]) -> None:
    unmatched = [target for target in target_modules if not any(_matches(name, target) for name in linear)]
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise TrainingError(
            "target_modules",
            f"adapter.target_modules has names that match no layer of this base model: {', '.join(unmatched)}",
            f"use its linear layers ({', '.join(known)}), or leave adapter.target_modules out",
        )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")

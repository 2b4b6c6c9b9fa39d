"""The base model, frozen and perhaps quantised, with LoRA layers in it. It knows no data."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from app.domain.specs import LoraAdapter, Quantization, TrainSpec
from worker.precision import Precision
from worker.training.errors import TrainingError

DENSE_LIMIT = 2**30
"""On a CPU, a base of at most this many bytes on disk is kept dequantised after it was quantised."""

CHECKPOINTING_FROM = 1_000_000_000
"""Parameters of the base from which `enable_gradient_checkpointing: auto` means yes on a GPU."""


@dataclass(frozen=True, slots=True)
class Trainee:
    """What an update needs of the model: hidden states from `backbone`, logits from `head`."""

    peft: PeftModel
    backbone: nn.Module
    head: nn.Module
    vocab_size: int

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[rows, length] → [rows, length, width]. No mask: padding on the right is out of causal sight."""
        states: torch.Tensor = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.peft.named_parameters() if p.requires_grad}


def load_trainee(
    base: Path,
    spec: TrainSpec,
    precision: Precision,
    device: torch.device,
    say: Callable[[str], None],
) -> Trainee:
    """The base of the order, frozen, with fresh LoRA layers drawn from the global seed."""
    disable_bars: Any = transformers_logging.disable_progress_bar
    disable_bars()
    say("checking the base model's weights")
    check_finite(base)
    say("loading base model" if spec.quantization is None else "loading and quantising base model")
    model = _load_base(base, spec.quantization, precision, device)
    model.requires_grad_(False)
    adapted = _adapt(model, spec)
    if _checkpointing(spec.trainer.enable_gradient_checkpointing, model, device):
        switch: Any = model
        switch.activation_checkpointing_enable({"use_reentrant": False})
        switch.enable_input_require_grads()
    adapted.train()
    whole: Any = model
    trainee = Trainee(adapted, model.base_model, whole.get_output_embeddings(), whole.config.vocab_size)
    _check_head(model, trainee, device)
    return trainee


def check_finite(base: Path) -> None:
    """Raise TrainingError when a weight is NaN or infinite: quantisation would hide it."""
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a dict
                values = tensors.get_tensor(key)
                if values.is_floating_point() and values.numel():
                    lowest, highest = torch.aminmax(values)
                    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
                        raise TrainingError(
                            "base_not_finite",
                            f"the base model's weight {key} holds NaN or infinity",
                            "fetch the base model again, or choose another one",
                        )


def _load_base(
    base: Path, quantization: Quantization | None, precision: Precision, device: torch.device
) -> PreTrainedModel:
    dense = device.type == "cpu" and quantization is not None and _bytes(base) <= DENSE_LIMIT
    untyped: Any = BitsAndBytesConfig
    config = quantization and untyped(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=precision.compute,
    )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype="auto" if dense else precision.compute,
            quantization_config=config,
            device_map={"": device},
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(
            "base_not_loadable", f"the base model cannot be loaded: {error}", "remove it and add it again"
        ) from error
    if dense:
        # A 4-bit layer dequantises before each product, on which a CPU spends a third of an update. Rounded to the
        # stored dtype first, the weights are those that serving dequantises to.
        model = model.dequantize(dtype=model.dtype).to(precision.compute)
    loaded: PreTrainedModel = model
    return loaded


def _bytes(base: Path) -> int:
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))


def _adapt(model: PreTrainedModel, spec: TrainSpec) -> PeftModel:
    adapter = spec.adapter
    if not isinstance(adapter, LoraAdapter):
        raise TrainingError("not_yet_supported", "only adapters of type lora are trained so far", None)
    _check_targets(model, adapter)
    alpha: Any = adapter.scale_alpha  # PEFT asks for an int but only multiplies by it
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        target_modules=adapter.target_modules
        if isinstance(adapter.target_modules, str)
        else list(adapter.target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def _check_targets(model: PreTrainedModel, adapter: LoraAdapter) -> None:
    """PEFT passes over a name that matches nothing as long as another one matches."""
    if isinstance(adapter.target_modules, str):
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    unmatched = [
        target
        for target in adapter.target_modules
        if not any(name == target or name.endswith(f".{target}") for name in linear)
    ]
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise TrainingError(
            "target_modules",
            f"adapter.target_modules names nothing in this base model: {', '.join(unmatched)}",
            f"its linear layers are {', '.join(known)}; or leave it at all-linear",
        )


def _checkpointing(wanted: bool | str, model: PreTrainedModel, device: torch.device) -> bool:
    if isinstance(wanted, bool):
        return wanted
    return device.type != "cpu" and model.num_parameters() > CHECKPOINTING_FROM


def _check_head(model: PreTrainedModel, trainee: Trainee, device: torch.device) -> None:
    """Some architectures scale or cap their logits behind the head; the loss here would not know of it."""
    ids = torch.arange(min(8, model.config.vocab_size), device=device)[None]
    with torch.no_grad():
        whole, parts = model(input_ids=ids, use_cache=False).logits, trainee.head(trainee.hidden(ids))
    if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise TrainingError(
            "unsupported_architecture",
            f"{type(model).__name__} changes its logits after the output layer, which training does not do",
            "use a Llama, Mistral, Qwen2 or SmolLM model",
        )

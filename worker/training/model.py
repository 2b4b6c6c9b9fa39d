"""Loads the base model, quantised if the spec says so, and applies the tuning method. It knows no data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from app.domain import memory
from app.domain.attempts import EncodedRow
from app.domain.specs import TrainSpec
from app.domain.tuning_methods import Quantization
from worker.architecture import window_of, windows_of
from worker.precision import Precision
from worker.quantization import bitsandbytes_config
from worker.training.batches import MicroBatch, collate
from worker.training.errors import TrainingError
from worker.training.llama_forward import build_training_forward
from worker.training.packing import batch_attention_mask
from worker.training.tuning_methods import TuningMethod, apply_tuning_method, load_adapter_weights

MAX_RELATIVE_ERROR = 0.25
"""Largest difference between the hidden states of our Llama forward and of transformers', relative to their norm.

Rounding to 16 bits over thirty layers gave 0.07 on arbitrary tokens. Another architecture gives about 1."""

HiddenStates = Callable[[MicroBatch], torch.Tensor]
"""Forward pass without the head: a micro-batch → [num_tokens, hidden_size]."""


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """The model as an update needs it.

    `hidden`: forward pass without the head. `head`: hidden states → logits, [num_tokens, vocab_size].
    """

    method: TuningMethod
    backbone: nn.Module
    hidden: HiddenStates
    head: nn.Module
    vocab_size: int


def load_trainable_model(
    base: Path,
    spec: TrainSpec,
    updates: int,
    precision: Precision,
    device: torch.device,
    log: Callable[[str], None],
    start_from: Path | None = None,
) -> TrainableModel:
    """Load the base and apply the tuning method of `spec`.

    The global seed draws a new adapter's weights. `start_from`: directory of an adapter whose weights are loaded
    instead. Raises TrainingError.
    """
    disable_bars: Any = transformers_logging.disable_progress_bar
    disable_bars()
    log("checking the base model's weights")
    check_finite(base)
    log("loading base model" if spec.quantization is None else "loading and quantising base model")
    model = _load_base(base, spec.quantization, precision, device)
    method = apply_tuning_method(model, spec.adapter, updates)
    if start_from is not None:
        log("loading the weights of the adapter to start from")
        load_adapter_weights(method, start_from)
    method.module.train()  # before the first forward: in eval mode bitsandbytes repacks 4-bit weights on a CPU
    _check_logits(model)
    whole: Any = model
    # The plan has replaced "auto" in the order's spec.
    hidden = _choose_forward(model, method, recompute=spec.trainer.enable_gradient_checkpointing is True)
    return TrainableModel(method, model.base_model, hidden, whole.get_output_embeddings(), whole.config.vocab_size)


def check_finite(base: Path) -> None:
    """Raise TrainingError if a weight is NaN or infinite. Quantisation would hide it."""
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a dict
                values = tensors.get_tensor(key)
                if values.is_floating_point() and values.numel():
                    lowest, highest = torch.aminmax(values)
                    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
                        raise TrainingError(
                            "base_not_finite",
                            f"the base model's weight {key} has NaN or infinite values",
                            "fetch the base model again, or choose another one",
                        )


def _load_base(
    base: Path, quantization: Quantization | None, precision: Precision, device: torch.device
) -> PreTrainedModel:
    dequantize = (
        device.type == "cpu" and quantization is not None and _weight_bytes(base) <= memory.KEEP_DEQUANTIZED_UP_TO
    )
    config = quantization and bitsandbytes_config(
        quantization.bits, quantization.quant_type, double_quant=quantization.double_quant, compute=precision.compute
    )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype="auto" if dequantize else precision.compute,
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
    if dequantize:
        # A 4-bit layer dequantises its weight in each forward, which takes a CPU a third of an update. An 8-bit layer
        # also quantises its input. The weights are rounded to the stored dtype first, as the engine dequantises them.
        model = model.dequantize(dtype=model.dtype).to(precision.compute)
    typed: PreTrainedModel = model
    return typed


def _weight_bytes(base: Path) -> int:
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))


def _choose_forward(model: PreTrainedModel, method: TuningMethod, *, recompute: bool) -> HiddenStates:
    """Our Llama forward if it supports the model and gives the same hidden states, else transformers' forward.

    `recompute`: gradient checkpointing.
    """
    untyped: Any = model
    window, windows = window_of(model.config), _windows(model)

    def transformers_forward(batch: MicroBatch) -> torch.Tensor:
        def mask_of(size: int | None) -> torch.Tensor:  # [1, 1, num_tokens, num_tokens]
            return batch_attention_mask(batch.rows, batch.ids.device, size)[None, None]

        mask = {layer_type: mask_of(size) for layer_type, size in windows.items()} or mask_of(window)
        inputs = {"input_ids": batch.ids[None], "position_ids": batch.positions[None], "attention_mask": mask}
        states: torch.Tensor = untyped.base_model(**inputs, use_cache=False).last_hidden_state
        return states[0]

    llama_forward = build_training_forward(method.module, model.base_model, recompute=recompute)
    if llama_forward is not None and _gives_same_states(llama_forward, transformers_forward, model):
        return llama_forward
    if recompute:
        untyped.activation_checkpointing_enable({"use_reentrant": False})
        untyped.enable_input_require_grads()
    return transformers_forward


def _windows(model: PreTrainedModel) -> dict[str, int | None]:
    try:
        return windows_of(model.config)
    except ValueError as error:
        raise TrainingError(
            "unsupported_architecture",
            f"{type(model).__name__} has {error}, which cannot train on packed rows",
            "use a model whose layers are all attention, such as Llama, Mistral, Qwen2 or SmolLM",
        ) from None


def _gives_same_states(forward: HiddenStates, reference: HiddenStates, model: PreTrainedModel) -> bool:
    """Whether both give the same hidden states for a short row, except for rounding."""
    ids = tuple(range(min(8, model.config.vocab_size)))
    batch = collate([EncodedRow(line=1, ids=ids, trained=())]).to(model.device)
    with torch.no_grad():
        states, expected = forward(batch).float(), reference(batch).float()
    return bool((states - expected).norm() <= MAX_RELATIVE_ERROR * expected.norm())


def _check_logits(model: PreTrainedModel) -> None:
    """Raise TrainingError if the model scales or caps its logits after the head. The loss takes the head's output."""
    untyped: Any = model
    ids = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # the same dropout for both
        expected = untyped(input_ids=ids, use_cache=False).logits
        torch.manual_seed(0)
        logits = untyped.get_output_embeddings()(untyped.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(expected, logits, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise TrainingError(
            "unsupported_architecture",
            f"{type(model).__name__} changes its logits after the output layer, which training does not do",
            "use a Llama, Mistral, Qwen2 or SmolLM model",
        )

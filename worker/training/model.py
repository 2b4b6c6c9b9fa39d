"""The base model, perhaps quantised, with what is trained of it, as an update needs them. It knows no data."""

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
from worker.training.tuning_methods import TuningMethod, apply_tuning_method, fill

ALIKE = 0.25
"""How far the fast form's hidden states may be from transformers', as a share of their norm: rounding to sixteen bits
over thirty layers was seen to give 0.07 on nonsense, another architecture gives about 1."""

Hidden = Callable[[MicroBatch], torch.Tensor]


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """What an update needs of the model: hidden states from `hidden`, logits from `head`.

    `hidden`: a batch → [tokens, width].
    """

    method: TuningMethod
    backbone: nn.Module
    hidden: Hidden
    head: nn.Module
    vocab_size: int


def load_trainable_model(
    base: Path,
    spec: TrainSpec,
    updates: int,
    precision: Precision,
    device: torch.device,
    say: Callable[[str], None],
    start_from: Path | None = None,
) -> TrainableModel:
    """The base of the order with what `spec` trains of it: fresh and drawn from the global seed, or with the weights of
    the adapter in `start_from`."""
    disable_bars: Any = transformers_logging.disable_progress_bar
    disable_bars()
    say("checking the base model's weights")
    check_finite(base)
    say("loading base model" if spec.quantization is None else "loading and quantising base model")
    model = _load_base(base, spec.quantization, precision, device)
    method = apply_tuning_method(model, spec.adapter, updates)
    if start_from is not None:
        say("taking over the weights of a trained adapter")
        fill(method, start_from)
    method.module.train()  # before any forward: in eval mode bitsandbytes repacks 4-bit weights on a CPU
    _check_head(model)
    whole: Any = model
    # The plan has decided what auto means here, and the order's spec says so.
    hidden = _hidden(model, method, recompute=spec.trainer.enable_gradient_checkpointing is True)
    return TrainableModel(method, model.base_model, hidden, whole.get_output_embeddings(), whole.config.vocab_size)


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
    dense = device.type == "cpu" and quantization is not None and _bytes(base) <= memory.KEEP_DEQUANTIZED_UP_TO
    config = quantization and bitsandbytes_config(
        quantization.bits, quantization.quant_type, double_quant=quantization.double_quant, compute=precision.compute
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
        # A 4-bit layer dequantises before each product, on which a CPU spends a third of an update, and an 8-bit one
        # quantises its input too. Rounded to the stored dtype first, the weights are those that serving dequantises to.
        model = model.dequantize(dtype=model.dtype).to(precision.compute)
    loaded: PreTrainedModel = model
    return loaded


def _bytes(base: Path) -> int:
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))


def _hidden(model: PreTrainedModel, method: TuningMethod, *, recompute: bool) -> Hidden:
    """The fast form of the Llama family where it fits and gives the same, else transformers' own."""
    untyped: Any = model
    window, windows = window_of(model.config), _windows(model)

    def stock(batch: MicroBatch) -> torch.Tensor:
        def seen(places: int | None) -> torch.Tensor:
            return batch_attention_mask(batch.rows, batch.ids.device, places)[None, None]

        mask = {kind: seen(places) for kind, places in windows.items()} or seen(window)
        asked = {"input_ids": batch.ids[None], "position_ids": batch.positions[None], "attention_mask": mask}
        states: torch.Tensor = untyped.base_model(**asked, use_cache=False).last_hidden_state
        return states[0]

    fast = build_training_forward(method.module, model.base_model, recompute=recompute)
    if fast is not None and _alike(fast, stock, model):
        return fast
    if recompute:
        untyped.activation_checkpointing_enable({"use_reentrant": False})
        untyped.enable_input_require_grads()
    return stock


def _windows(model: PreTrainedModel) -> dict[str, int | None]:
    try:
        return windows_of(model.config)
    except ValueError as error:
        raise TrainingError(
            "unsupported_architecture",
            f"{type(model).__name__} has {error}, whose rows cannot be packed",
            "use a model whose layers are all attention, such as Llama, Mistral, Qwen2 or SmolLM",
        ) from None


def _alike(one: Hidden, other: Hidden, model: PreTrainedModel) -> bool:
    """Whether both give the same hidden states, but for rounding."""
    ids = tuple(range(min(8, model.config.vocab_size)))
    batch = collate([EncodedRow(line=1, ids=ids, trained=())]).to(model.device)
    with torch.no_grad():
        found, wanted = one(batch).float(), other(batch).float()
    return bool((found - wanted).norm() <= ALIKE * wanted.norm())


def _check_head(model: PreTrainedModel) -> None:
    """Some architectures scale or cap their logits behind the head; the loss here would not know of it."""
    untyped: Any = model
    ids = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # both draw the same dropout
        whole = untyped(input_ids=ids, use_cache=False).logits
        torch.manual_seed(0)
        parts = untyped.get_output_embeddings()(untyped.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise TrainingError(
            "unsupported_architecture",
            f"{type(model).__name__} changes its logits after the output layer, which training does not do",
            "use a Llama, Mistral, Qwen2 or SmolLM model",
        )

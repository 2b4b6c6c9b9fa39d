"""Loading a base model's weights, for the engine and for export, so that both compute the same function.

On a CPU a quantised base is loaded as its dequantised weights: the same function, but faster.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel


def load_weights(
    directory: Path,
    config: Any,
    held: BitsAndBytesConfig | None,
    device: torch.device,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """The model in `directory`, held as `held` says. `dtype` computes; None leaves the dtype that is stored."""
    dequantise = held is not None and device.type == "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype="auto" if dequantise or dtype is None else dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        device_map={"": device} if device.type == "cuda" else None,
        quantization_config=held,
    )
    if dequantise:
        # Before the first forward: in eval mode bitsandbytes repacks CPU weights, and then they no longer
        # dequantise to the values that training saw, which are rounded to the stored dtype first.
        model = model.dequantize(dtype=model.dtype).to(dtype or model.dtype)
    model.eval()
    loaded: PreTrainedModel = model.requires_grad_(False)
    return loaded

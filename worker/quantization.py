"""The bitsandbytes configuration of a quantisation, for training and for serving."""

from typing import Any

import torch
from transformers import BitsAndBytesConfig


def bitsandbytes_config(bits: int, quant_type: str, *, double_quant: bool, compute: torch.dtype) -> BitsAndBytesConfig:
    """The configuration to load a model with. 8 bits have no options."""
    untyped: Any = BitsAndBytesConfig
    config: BitsAndBytesConfig = (
        untyped(load_in_8bit=True)
        if bits == 8
        else untyped(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=compute,
        )
    )
    return config

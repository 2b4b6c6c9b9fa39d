"""A base model in memory: its weights, quantised as served, its tokenizer, and its limits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from app.tokenizers import TextEncoder
from worker.inference.cache.kv_cache_pool import KVShape
from worker.inference.errors import ModelError
from worker.inference.ipc import EngineSettings
from worker.inference.sampling_params import ServedModel
from worker.precision import precision_here
from worker.quantization import bitsandbytes_config
from worker.weights import load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION_KINDS = {"full_attention", "sliding_attention"}


class ServedQuantization(BaseModel):
    """How the linear layers' weights are stored. `double`: block scales are quantised, too, as in QLoRA."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bits: int
    type: str = "nf4"
    double: bool = True


@dataclass(frozen=True)
class Base:
    """One served base.

    - `eos_ids`: the tokens that end a completion.
    - `vocabulary`: the width of the logits.
    - `context`: the longest sequence, in tokens.
    - `kv_shape`: what its KV cache is made of.
    """

    digest: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    text: TextEncoder
    tokenizer_digest: str
    eos_ids: tuple[int, ...]
    vocabulary: int
    context: int
    kv_shape: KVShape


def compute_device(settings: EngineSettings) -> torch.device:
    """The device asked for, or CUDA if there is one."""
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(settings: EngineSettings, device: torch.device) -> torch.dtype:
    """The dtype asked for, or the one that training computes in on this hardware."""
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    return precision_here(device, "unknown").compute


def load_base(served: ServedModel, device: torch.device, dtype: torch.dtype) -> Base:
    """Read a base from its directory. Raises ModelError when it cannot be served."""
    directory = Path(served.base_path)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        model = load_weights(directory, config, _quantization_config(served.quantization, dtype), device, dtype)
        text = (directory / "tokenizer.json").read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
    except ModelError:
        raise
    except Exception as error:
        reason = f"base model {served.base_digest} cannot be loaded: {type(error).__name__}"
        raise ModelError(reason) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Base(
        digest=served.base_digest,
        model=model,
        tokenizer=tokenizer,
        text=TextEncoder(tokenizer),
        tokenizer_digest=hashlib.sha256(text.encode()).hexdigest(),
        eos_ids=_eos_ids(model),
        vocabulary=int(config.get_text_config().vocab_size),
        context=_context(config.get_text_config(), served.base_digest),
        kv_shape=_kv_shape(served.base_digest, config.get_text_config(), dtype),
    )


def _quantization_config(quantization: dict[str, Any] | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization is None:
        return None
    asked = ServedQuantization.model_validate(quantization)
    return bitsandbytes_config(asked.bits, asked.type, double_quant=asked.double, compute=dtype)


def _eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    found: list[int] = []
    for source in (generation, model.config.get_text_config()):
        value: int | Sequence[int] | None = getattr(source, "eos_token_id", None)
        found += [] if value is None else [value] if isinstance(value, int) else list(value)
    return tuple(dict.fromkeys(found))


def _kv_shape(digest: str, config: Any, dtype: torch.dtype) -> KVShape:
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_layers = int(config.num_hidden_layers)
    return KVShape(digest, num_layers, int(2 * num_kv_heads * head_dim * dtype.itemsize * num_layers))


def _context(config: Any, digest: str) -> int:
    """The longest sequence, in tokens, for which one causal mask is right in every layer."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= ATTENTION_KINDS:
        raise ModelError(f"base model {digest} has layers without a key-value cache; it cannot be served")
    limits = [getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None)]
    return min((int(limit) for limit in limits if limit), default=2**31)

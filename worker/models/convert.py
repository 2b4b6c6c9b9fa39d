"""A GGUF file → a directory of safetensors, config and tokenizer, the same bytes every time."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

SPLITS_DIGITS = "smollm"
"""The GGUF name of the pre-tokenizer that takes digits one by one."""


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the model of `gguf` into `directory`: bfloat16 safetensors, config.json, tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    _convert_weights(gguf, directory)
    _convert_tokenizer(gguf, directory)


def _convert_weights(gguf: Path, directory: Path) -> None:
    # Left packed, the model would count as quantised and could not be saved as a plain one.
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=unpacked
    )
    model.save_pretrained(directory)
    # Neither says anything about the model, and either would change the digest.
    _drop(directory / "config.json", "_name_or_path", "_model_name_or_path", "transformers_version")
    _drop(directory / "generation_config.json", "transformers_version")


def _convert_tokenizer(gguf: Path, directory: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if _pre_tokenizer_name(gguf) == SPLITS_DIGITS:
        # transformers does not read this rule; without it "  1984" gets other ids than in pretraining.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)


def _pre_tokenizer_name(gguf: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def _drop(path: Path, *keys: str) -> None:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")

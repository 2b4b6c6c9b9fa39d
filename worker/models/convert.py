"""A GGUF file → a directory of safetensors, config and tokenizer, the same bytes every time."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from worker.models.errors import BaseModelError

FAMILIES = ("gemma3", "llama", "qwen2")
"""By their names in GGUF. The conversion of each was compared with its publisher's model."""

SMOLLM, QWEN2 = "smollm", "qwen2"
"""GGUF names of pre-tokenizers."""


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the model of `gguf` into `directory`: bfloat16 safetensors, config.json, tokenizer.json.

    Raises BaseModelError for a damaged file and for another family.
    """
    _check_family(gguf)
    directory.mkdir(parents=True, exist_ok=True)
    _convert_weights(gguf, directory)
    _convert_tokenizer(gguf, directory)


def _check_family(gguf: Path) -> None:
    try:
        family = _field(gguf, "general.architecture")
    except Exception as error:  # the reader fails as the bytes make it fail
        raise BaseModelError(
            "broken_file", f"the GGUF file cannot be read: {type(error).__name__}", "download the file again"
        ) from error
    if family not in FAMILIES:
        raise BaseModelError(
            "unsupported_architecture",
            f"the GGUF file holds a model of the family {family!r}",
            f"use one of these families: {', '.join(FAMILIES)}; or add the publisher's safetensors",
        )


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
    # transformers leaves out two rules, without which some texts get other ids than in pretraining.
    rule = _field(gguf, "tokenizer.ggml.pre")
    if rule == SMOLLM:  # digits one by one: "  1984"
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif rule == QWEN2:  # composed characters: an e and an accent are one
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)


def _field(gguf: Path, key: str) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get(key)
    return None if field is None else str(field.contents())


def _drop(path: Path, *keys: str) -> None:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")

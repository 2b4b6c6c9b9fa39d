"""Creates a base model of given sizes and LoRA adapters over it, with random weights, to measure speed and memory."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig

from app.domain.architectures import Architecture

SPREAD = 0.02
"""Standard deviation, as models of this family begin with."""


def write_base(sizes: Architecture, directory: Path, device: torch.device) -> Path:
    """Config, an empty tokenizer and a file of float16 weights for each layer."""
    directory.mkdir(parents=True)
    config_of(sizes).save_pretrained(directory)
    Tokenizer(BPE()).save(str(directory / "tokenizer.json"))
    draw = _drawing(device)
    outer = {"model.embed_tokens.weight": draw(sizes.vocabulary, sizes.hidden), "model.norm.weight": draw(sizes.hidden)}
    if not sizes.tied:
        outer["lm_head.weight"] = draw(sizes.vocabulary, sizes.hidden)
    save_file(outer, directory / "model-outer.safetensors", {"format": "pt"})
    index = dict.fromkeys(outer, "model-outer.safetensors")
    for number in range(sizes.layers):
        name, prefix = f"model-{number:02}.safetensors", f"model.layers.{number}"
        norms = {
            f"{prefix}.{norm}.weight": draw(sizes.hidden) for norm in ("input_layernorm", "post_attention_layernorm")
        }
        linears = {
            f"{prefix}.{home}.{leaf}.weight": draw(outputs, inputs) for home, leaf, inputs, outputs in _linears(sizes)
        }
        save_file(norms | linears, directory / name, {"format": "pt"})
        index |= dict.fromkeys([*norms, *linears], name)
    _write_index(directory, index)
    return directory


def write_adapter(sizes: Architecture, directory: Path, rank: int, device: torch.device) -> Path:
    """A LoRA adapter on every linear layer, with random weights."""
    leaves = sorted(leaf for _, leaf, _, _ in _linears(sizes))
    LoraConfig(r=rank, lora_alpha=rank, target_modules=leaves, task_type="CAUSAL_LM").save_pretrained(str(directory))
    draw = _drawing(device)
    weights: dict[str, torch.Tensor] = {}
    for number in range(sizes.layers):
        for home, leaf, inputs, outputs in _linears(sizes):
            name = f"base_model.model.model.layers.{number}.{home}.{leaf}"
            weights |= {f"{name}.lora_A.weight": draw(rank, inputs), f"{name}.lora_B.weight": draw(outputs, rank)}
    save_file(weights, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def config_of(sizes: Architecture) -> LlamaConfig:
    """What transformers makes a model of these sizes from."""
    untyped: Any = LlamaConfig
    config: LlamaConfig = untyped(
        architectures=["LlamaForCausalLM"],
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        tie_word_embeddings=sizes.tied,
        attention_bias=sizes.qkv_bias,
        attn_implementation="sdpa",
        max_position_embeddings=4_096,
        dtype="float16",
    )
    return config


def _linears(sizes: Architecture) -> Iterator[tuple[str, str, int, int]]:
    for leaf, (inputs, outputs) in sizes.linears.items():
        yield "self_attn" if leaf in {"q_proj", "k_proj", "v_proj", "o_proj"} else "mlp", leaf, inputs, outputs


def _drawing(device: torch.device) -> Callable[..., torch.Tensor]:
    """Matrices around 0, vectors, which are norms, around 1."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, device=device, dtype=torch.float16, generator=generator) * SPREAD
        return (drawn + 1 if len(shape) == 1 else drawn).cpu()

    return draw


def _write_index(directory: Path, index: dict[str, str]) -> None:
    whole = {"metadata": {}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(whole), encoding="utf-8")

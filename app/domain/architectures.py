"""Architectures: the sizes of a language model's layers, read from its config.json. Numbers only, no weights."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ValidationError

from app.domain.frozen import Frozen

LLAMA_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2"})
"""`model_type` of the architectures whose layers are Llama layers. SmolLM2 has the type `llama`."""


class Architecture(Frozen):
    """The sizes of a decoder-only model.

    `is_llama_family`: every layer is a Llama layer, so `llama_forward` can run it.
    `qkv_bias`: the projections to queries, keys and values add a bias.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    is_llama_family: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """The sizes in a config.json; None if it lacks one of the usual keys."""
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
            return None
        kind = config.get("model_type")
        try:
            return cls(
                hidden=hidden,
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                intermediate=config["intermediate_size"],
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=bool(config.get("attention_bias", kind == "qwen2")),
                is_llama_family=_is_llama_family(config),
            )
        except (KeyError, ValidationError):
            return None

    @property
    def query_width(self) -> int:
        """Width of all query heads together: heads × head_dim."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads together: kv_heads × head_dim. Value heads have the same."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer: name → (inputs, outputs)."""
        return {
            "q_proj": (self.hidden, self.query_width),
            "k_proj": (self.hidden, self.key_width),
            "v_proj": (self.hidden, self.key_width),
            "o_proj": (self.query_width, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Number of weights in all linear layers but the output head. Quantisation packs these."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def other_parameters(self) -> int:
        """Number of weights that quantisation leaves alone: embeddings, an untied output head, norms, biases."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        biases = self.layers * (self.query_width + 2 * self.key_width) if self.qkv_bias else 0
        return embeddings + biases + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters


def _is_llama_family(config: Mapping[str, Any]) -> bool:
    sliding_window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    plain = config.get("hidden_act", "silu") == "silu" and not config.get("attention_dropout")
    return config.get("model_type") in LLAMA_MODEL_TYPES and plain and sliding_window is None


def _llama(hidden: int, layers: int, kv_heads: int, intermediate: int, vocabulary: int) -> Architecture:
    return Architecture(
        hidden=hidden,
        layers=layers,
        heads=hidden // 128,
        kv_heads=kv_heads,
        head_dim=128,
        intermediate=intermediate,
        vocabulary=vocabulary,
        tied=False,
    )


PUBLISHED_ARCHITECTURES: dict[str, Architecture] = {
    "Llama-2-7B": _llama(4096, 32, 32, 11_008, 32_000),
    "Llama-3.1-8B": _llama(4096, 32, 8, 14_336, 128_256),
    "Mistral-7B": _llama(4096, 32, 8, 14_336, 32_768),
    "Qwen2.5-7B": _llama(3584, 28, 4, 18_944, 152_064).model_copy(update={"qkv_bias": True}),
    "SmolLM2-135M": Architecture(
        hidden=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        intermediate=1536,
        vocabulary=49_152,
        tied=True,
    ),
}
"""Published sizes, for estimates and benchmarks. A deployment trains only the base models that it lists."""

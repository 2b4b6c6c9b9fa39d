"""What a model's configuration says about its layers. Knows no weights."""

from typing import Any

FAMILY = frozenset({"llama", "mistral", "qwen2"})
"""`model_type` of the architectures whose layers are those of Llama and nothing more (SmolLM is one of them)."""


def window_of(config: Any) -> int | None:
    """How far back a token looks at most; None without such a bound."""
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


def is_llama(config: Any) -> bool:
    """Whether every layer is norm, attention over rotary positions, norm and gated linear unit, without dropout."""
    return (
        config.model_type in FAMILY
        and config.hidden_act == "silu"
        and not config.attention_dropout
        and window_of(config) is None
    )

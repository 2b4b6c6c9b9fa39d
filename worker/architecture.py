"""What a model's configuration says about its layers. Knows no weights."""

from typing import Any

from app.domain.architectures import LLAMA_MODEL_TYPES


def window_of(config: Any) -> int | None:
    """How far back a token looks at most; None without such a bound."""
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


def windows_of(config: Any) -> dict[str, int | None]:
    """Kind of layer → how far it looks back, for a model whose layers differ in that; else nothing.

    Raises ValueError for kinds that are no attention.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of the kind {', '.join(sorted(unknown))}")
    windows: dict[str, int | None] = {
        "full_attention": None,
        "sliding_attention": getattr(config, "sliding_window", None),
    }
    return windows if len(kinds) > 1 else {}


def is_llama(config: Any) -> bool:
    """Whether every layer is norm, attention over rotary positions, norm and gated linear unit, without dropout."""
    return (
        config.model_type in LLAMA_MODEL_TYPES
        and config.hidden_act == "silu"
        and not config.attention_dropout
        and window_of(config) is None
    )

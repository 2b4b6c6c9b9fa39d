"""Properties of a model's layers, read from its configuration alone."""

from typing import Any

from app.domain.architectures import LLAMA_MODEL_TYPES


def window_of(config: Any) -> int | None:
    """The sliding attention window in tokens; None if there is none."""
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


def windows_of(config: Any) -> dict[str, int | None]:
    """Kind of layer → its attention window, if the model's layers differ in that; else empty.

    Raises ValueError for layers other than attention.
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
    """Whether every layer is RMSNorm, attention with RoPE, RMSNorm and SwiGLU, without dropout."""
    return (
        config.model_type in LLAMA_MODEL_TYPES
        and config.hidden_act == "silu"
        and not config.attention_dropout
        and window_of(config) is None
    )

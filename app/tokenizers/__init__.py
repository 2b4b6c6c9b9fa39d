"""Loads a base model's tokenizer.json."""

from app.tokenizers.text_encoder import TextEncoder
from app.tokenizers.tokenization import load_tokenization

__all__ = ["TextEncoder", "load_tokenization"]

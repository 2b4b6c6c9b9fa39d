"""A base model's tokenizer blob → how this project encodes and decodes."""

from app.tokenizers.text_encoder import TextEncoder
from app.tokenizers.tokenization import load_tokenization

__all__ = ["TextEncoder", "load_tokenization"]

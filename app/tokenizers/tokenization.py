"""Loads a tokenizer.json as a `Tokenization`, with the `tokenizers` library and without torch."""

from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import Tokenizer

from app.domain.encoding import Tokenization
from app.tokenizers.text_encoder import SENTINEL, TextEncoder, encode_behind_sentinel, get_sentinel


def load_tokenization(tokenizer_json: bytes, *, bos_id: int | None, eos_id: int) -> Tokenization:
    """Raises ValueError if the bytes are not a tokenizer.json. `bos_id` None: sequences have no BOS token."""
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"not a tokenizer.json that can be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    text = TextEncoder(tokenizer)
    return Tokenization(
        encode=text.encode,
        encode_template=_template_encoder(tokenizer, text),
        decode=_decoder(tokenizer),
        bos_id=bos_id,
        eos_id=eos_id,
        vocab_size=tokenizer.get_vocab_size(),
    )


def _decoder(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    sentinel = get_sentinel(tokenizer)

    def decode(ids: Sequence[int]) -> str:
        if not sentinel:
            return str(tokenizer.decode(list(ids), skip_special_tokens=True))
        return str(tokenizer.decode([*sentinel, *ids], skip_special_tokens=True)).removeprefix(SENTINEL)

    return decode


def _template_encoder(tokenizer: Tokenizer, text: TextEncoder) -> Callable[[str], Sequence[int]]:
    """Returns a function that encodes a prompt template. Control tokens in a template keep their ids.

    A template with control tokens needs a second tokenizer, because `encode_special_tokens` is a setting of the
    tokenizer that threads share. Few templates have any.
    """

    @cache
    def get_template_tokenizer() -> tuple[Tokenizer, list[int]]:
        copy = Tokenizer.from_str(tokenizer.to_str())
        return copy, get_sentinel(copy)

    def encode_template(template: str) -> Sequence[int]:
        if not text.names_control_token(template):
            return text.encode(template)
        template_tokenizer, sentinel = get_template_tokenizer()
        return encode_behind_sentinel(
            lambda piece: list(template_tokenizer.encode(piece, add_special_tokens=False).ids), template, sentinel
        )

    return encode_template

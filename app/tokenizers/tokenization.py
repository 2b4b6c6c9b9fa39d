"""tokenizer.json → `Tokenization`, with the `tokenizers` library and no torch.

Atoms stand mid-document, but a SentencePiece-style tokenizer puts a dummy space before whatever it is given. So for
such a tokenizer a newline is encoded in front of each atom and its ids are dropped again.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

from app.domain.encoding import Tokenization

_SENTINEL = "\n"


def load_tokenization(tokenizer_json: bytes, *, bos_id: int | None, eos_id: int) -> Tokenization:
    """Raises ValueError when the bytes are not a tokenizer. `bos_id` None: sequences begin without one."""
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"not a tokenizer.json that can be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    sentinel = _ids(tokenizer, _SENTINEL) if _adds_dummy_prefix(tokenizer) else []

    def encode(text: str) -> Sequence[int]:
        if not sentinel:
            return _ids(tokenizer, text)
        ids = _ids(tokenizer, _SENTINEL + text)
        if ids[: len(sentinel)] != sentinel:
            raise ValueError("this tokenizer merges a newline with the text behind it")
        return ids[len(sentinel) :]

    def decode(ids: Sequence[int]) -> str:
        if not sentinel:
            return str(tokenizer.decode(list(ids), skip_special_tokens=True))
        return str(tokenizer.decode([*sentinel, *ids], skip_special_tokens=True)).removeprefix(_SENTINEL)

    return Tokenization(
        encode=encode,
        decode=decode,
        bos_id=bos_id,
        eos_id=eos_id,
        vocab_size=tokenizer.get_vocab_size(),
    )


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _adds_dummy_prefix(tokenizer: Tokenizer) -> bool:
    """Whether "a" alone becomes "▁a": the mark of a dummy prefix."""
    return any(token.startswith("▁") for token in tokenizer.encode("a", add_special_tokens=False).tokens[:1])

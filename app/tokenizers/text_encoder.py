"""Encodes users' text so that no part of it becomes a control token, with any family of tokenizers.

A control token is a token that the tokenizer marks as special (`</s>`, `<|im_end|>`), or an unmarked added token in
angle or square brackets (Qwen's `<|fim_prefix|>` and `<tool_call>`). Other added tokens, such as runs of spaces, are
ordinary vocabulary.

A SentencePiece-style tokenizer adds a dummy space before every text, but our texts are the middle of a document. So a
newline is encoded in front of each text, and its ids are removed again.
"""

from collections.abc import Callable
from itertools import pairwise

from tokenizers import Encoding, Tokenizer

SENTINEL = "\n"


class TextEncoder:
    """Encodes with one `tokenizer`. It sets the tokenizer's `encode_special_tokens`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._control = get_control_tokens(tokenizer)
        self._sentinel = get_sentinel(tokenizer)
        self._before, self._after = _get_added_ids(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text in the middle of a document. Raises ValueError if the tokenizer cannot encode that."""
        return encode_behind_sentinel(self._spell, text, self._sentinel)

    def encode_document(self, text: str) -> list[int]:
        """The ids of a whole document, with the special tokens, such as BOS, that the tokenizer adds."""
        return [*self._before, *self._spell(text), *self._after]

    def names_control_token(self, text: str) -> bool:
        return any(name in text for name in self._control.values())

    def _spell(self, text: str) -> list[int]:
        """The ids of `text`. It is cut inside each control token that the tokenizer finds, until there is none.

        `encode_special_tokens` is not enough: a Unigram model has `</s>` in its own vocabulary.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        cuts = [] if self._control.keys().isdisjoint(encoding.ids) else self._cuts(text, encoding)
        if not cuts:
            return list(encoding.ids)
        first, *others = (text[start:end] for start, end in pairwise([0, *cuts, len(text)]))
        return [*self._spell(first), *(token for piece in others for token in self.encode(piece))]

    def _cuts(self, text: str, encoding: Encoding) -> list[int]:
        """Offsets in the middle of each control token that `text` contains.

        An `<unk>` for an unknown letter is none.
        """
        found = zip(encoding.ids, encoding.offsets, strict=True)
        spans = [(start, end, self._control[token]) for token, (start, end) in found if token in self._control]
        return [(start + end) // 2 for start, end, name in spans if self._is_spelled(name, text[start:end])]

    def _is_spelled(self, name: str, text: str) -> bool:
        normalizer = self._tokenizer.normalizer
        return len(text) > 1 and (name in text or (normalizer is not None and name in normalizer.normalize_str(text)))


def get_control_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Id of each control token → its text."""
    added = tokenizer.get_added_tokens_decoder()
    return {token: entry.content for token, entry in added.items() if entry.special or _is_bracketed(entry.content)}


def get_sentinel(tokenizer: Tokenizer) -> list[int]:
    """The ids of `SENTINEL` if the tokenizer adds a space before every text ("a" becomes "▁a"), else no ids."""
    first = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    has_dummy_prefix = any(token.startswith("▁") for token in first)
    return list(tokenizer.encode(SENTINEL, add_special_tokens=False).ids) if has_dummy_prefix else []


def encode_behind_sentinel(encode: Callable[[str], list[int]], text: str, sentinel: list[int]) -> list[int]:
    """Encodes `text` behind the sentinel and removes its ids. Raises ValueError if the tokenizer merges the two."""
    if not sentinel:
        return encode(text)
    ids = encode(SENTINEL + text)
    if ids[: len(sentinel)] != sentinel:
        raise ValueError("this tokenizer merges a newline with the text behind it")
    return ids[len(sentinel) :]


def _is_bracketed(content: str) -> bool:
    return len(content) > 2 and (content[0], content[-1]) in {("<", ">"), ("[", "]")}


def _get_added_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of special tokens that the tokenizer's template adds (before, after) a text."""
    encoding = tokenizer.encode("a")
    own = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
    start, end = (own[0], own[-1] + 1) if own else (len(encoding.ids), len(encoding.ids))
    return list(encoding.ids[:start]), list(encoding.ids[end:])

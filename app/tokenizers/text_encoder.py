"""Users' text → token ids that spell it: no part of the text becomes a control token, whatever the tokenizer's family.

A control token is one that the tokenizer marks as special (`</s>`, `<|im_end|>`), or an added token in angle or square
brackets that it does not mark so (Qwen's `<|fim_prefix|>` and `<tool_call>`). Other added tokens, such as runs of
spaces, are vocabulary.

Texts stand mid-document, but a SentencePiece-style tokenizer puts a dummy space before whatever it is given. So for
such a tokenizer a newline is encoded in front of each text and its ids are dropped again.
"""

from collections.abc import Callable
from itertools import pairwise

from tokenizers import Encoding, Tokenizer

SENTINEL = "\n"


class TextEncoder:
    """Encodes with one `tokenizer`, which from then on leaves the special tokens in a text alone."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._control = get_control_tokens(tokenizer)
        self._sentinel = get_sentinel(tokenizer)
        self._before, self._after = _frame(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text that stands mid-document. Raises ValueError for a tokenizer that cannot do so."""
        return behind_sentinel(self._spell, text, self._sentinel)

    def encode_document(self, text: str) -> list[int]:
        """The ids of a whole text with the special tokens, such as BOS, that the tokenizer itself puts around it."""
        return [*self._before, *self._spell(text), *self._after]

    def names_control_token(self, text: str) -> bool:
        return any(name in text for name in self._control.values())

    def _spell(self, text: str) -> list[int]:
        """The ids of `text`. It is cut inside each control token that the tokenizer finds in it, until there is none.

        `encode_special_tokens` does not suffice: a Unigram model takes `</s>` from its own vocabulary.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        cuts = [] if self._control.keys().isdisjoint(encoding.ids) else self._cuts(text, encoding)
        if not cuts:
            return list(encoding.ids)
        first, *others = (text[start:end] for start, end in pairwise([0, *cuts, len(text)]))
        return [*self._spell(first), *(token for piece in others for token in self.encode(piece))]

    def _cuts(self, text: str, encoding: Encoding) -> list[int]:
        """The middles of the control tokens that `text` spells. `<unk>` for an unknown letter is not spelled."""
        found = zip(encoding.ids, encoding.offsets, strict=True)
        spans = [(start, end, self._control[token]) for token, (start, end) in found if token in self._control]
        return [(start + end) // 2 for start, end, name in spans if self._is_spelled(name, text[start:end])]

    def _is_spelled(self, name: str, text: str) -> bool:
        normalizer = self._tokenizer.normalizer
        return len(text) > 1 and (name in text or (normalizer is not None and name in normalizer.normalize_str(text)))


def get_control_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The control tokens' ids → what they are written as."""
    added = tokenizer.get_added_tokens_decoder()
    return {token: entry.content for token, entry in added.items() if entry.special or _is_bracketed(entry.content)}


def get_sentinel(tokenizer: Tokenizer) -> list[int]:
    """The ids of `SENTINEL` for a tokenizer that puts a space before every text ("a" becomes "▁a"), else none."""
    first = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    has_dummy_prefix = any(token.startswith("▁") for token in first)
    return list(tokenizer.encode(SENTINEL, add_special_tokens=False).ids) if has_dummy_prefix else []


def behind_sentinel(encode: Callable[[str], list[int]], text: str, sentinel: list[int]) -> list[int]:
    """The ids that `encode` gives `text` mid-document. Raises ValueError for a tokenizer that cannot do so."""
    if not sentinel:
        return encode(text)
    ids = encode(SENTINEL + text)
    if ids[: len(sentinel)] != sentinel:
        raise ValueError("this tokenizer merges a newline with the text behind it")
    return ids[len(sentinel) :]


def _is_bracketed(content: str) -> bool:
    return len(content) > 2 and (content[0], content[-1]) in {("<", ">"), ("[", "]")}


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer's template puts (before, behind) a text."""
    encoding = tokenizer.encode("a")
    own = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    start, end = (own[0], own[-1] + 1) if own else (len(encoding.ids), len(encoding.ids))
    return list(encoding.ids[:start]), list(encoding.ids[end:])

"""Structured outputs: which tokens may come next, so that the completion matches a regex, a choice or a JSON schema.

llguidance does the work. Here it is bounded, and compiled grammars are cached.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from worker.inference.errors import GrammarError
from worker.inference.model.base import Base
from worker.inference.sampling_params import StructuredOutputs

# Fuel is work, so these bound time and memory: at worst 0.1 s and 50 MB for a first token, and 15 ms for another.
LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=200_000, max_lexer_states=50_000)

SLICES = [r"[^\[\]\n\x00-\x1F\x7F]{1,30}", *LLTokenizer.general_slices()]
"""Slices of the vocabulary that llguidance checks as a whole. The first one is what an action's argument is made of:
without it a mask takes 340 µs instead of 20."""


_TokenizerKey = tuple[str, tuple[int, ...]]
"""What a grammar is compiled for: a tokenizer's digest, and the tokens that end a completion. Two bases may share a
tokenizer and end by other tokens."""


class GrammarMatcher:
    """How far one completion has come in its grammar."""

    def __init__(self, matcher: LLMatcher, on_error: Callable[[], object]) -> None:
        """`on_error` is called when the grammar cannot be followed any further."""
        self._matcher, self._on_error = matcher, on_error

    def mask(self, vocabulary: int) -> torch.Tensor:
        """True for the tokens that may come next, [vocab]. Raises GrammarError."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.zeros(vocabulary, dtype=np.bool_)
        bits = np.unpackbits(packed, bitorder="little")[:vocabulary].astype(np.bool_)
        allowed[: len(bits)] = bits
        return torch.from_numpy(allowed)

    def accept(self, token: int) -> None:
        """Advance by one token. Raises GrammarError."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether no token can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            self._on_error()
            raise GrammarError(f"structured_outputs cannot be followed: {_first_words(self._matcher.get_error())}")


class GrammarCache:
    """Compiled grammars, an LRU."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._compiled: OrderedDict[tuple[_TokenizerKey, str, str], LLMatcher] = OrderedDict()
        self._tokenizers: dict[_TokenizerKey, LLTokenizer] = {}

    def start_matcher(self, base: Base, wanted: StructuredOutputs) -> GrammarMatcher:
        """A matcher at the start of the grammar. Raises GrammarError."""
        key = (_tokenizer_key(base), wanted.kind, wanted.text())
        if key not in self._compiled:
            self._compiled[key] = self._compile(base, wanted)
        self._compiled.move_to_end(key)
        if len(self._compiled) > self._capacity:
            self._compiled.popitem(last=False)
        # A grammar that was too expensive once is too expensive again: it is dropped from the cache.
        return GrammarMatcher(self._compiled[key].deep_copy(), lambda: self._compiled.pop(key, None))

    def _compile(self, base: Base, wanted: StructuredOutputs) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer(base), _source(wanted), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(f"structured_outputs.{wanted.kind} is not accepted: {_first_words(matcher.get_error())}")
        return matcher

    def _tokenizer(self, base: Base) -> LLTokenizer:
        key = _tokenizer_key(base)
        if key not in self._tokenizers:
            self._tokenizers[key] = LLTokenizer(
                base.tokenizer.to_str(), eos_token=list(base.eos_ids) or None, slices=SLICES
            )
        return self._tokenizers[key]


def _tokenizer_key(base: Base) -> _TokenizerKey:
    return base.tokenizer_digest, tuple(sorted(base.eos_ids))


def _source(wanted: StructuredOutputs) -> Any:
    if wanted.kind == "regex":
        return LLMatcher.grammar_from_regex(wanted.regex or "")
    if wanted.kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(f"({_escape(text)})" for text in wanted.choice or []))
    try:
        return LLMatcher.grammar_from_json_schema(json.loads(wanted.text()))
    except (ValueError, TypeError) as error:
        raise GrammarError(f"structured_outputs.json is not accepted: {_first_words(str(error))}") from error


def _escape(text: str) -> str:
    return re.sub(r"[^\w ]", lambda found: f"\\x{{{ord(found.group()):x}}}", text)


def _first_words(message: str) -> str:
    """The library's message without its dump of internal state."""
    return " ".join(message.split("<state>")[0].split())[:300]

"""GrammarCache: which tokens may come next, so that the answer matches a regex, a choice or a JSON schema.

The work is llguidance's; here it is bounded, compiled once and kept. Knows no model and no sampling.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from worker.inference.model.base import Base
from worker.inference.protocol import StructuredOutputs

# Fuel is work, so these bound time and memory: at worst 0.1 s and 50 MB for a first token, and 15 ms for another.
LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=200_000, max_lexer_states=50_000)

SLICES = [r"[^\[\]\n\x00-\x1F\x7F]{1,30}", *LLTokenizer.general_slices()]
"""Parts of the vocabulary that a grammar is asked about as a whole. The first one is what an action's argument is made
of: without it a mask takes 340 µs instead of 20."""


_Spelling = tuple[str, tuple[int, ...]]
"""What a grammar is compiled for: a tokenizer's digest, and the tokens that end an answer. Bases may share the one and
not the other."""


class GrammarError(Exception):
    """The grammar is invalid, or too expensive to follow."""


class GrammarMatcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher, give_up: Callable[[], object]) -> None:
        """`give_up` is called once it cannot be followed any further."""
        self._matcher, self._give_up = matcher, give_up

    def mask(self, vocabulary: int) -> torch.Tensor:
        """The tokens that may come next, as booleans [vocabulary]. Raises GrammarError."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.zeros(vocabulary, dtype=np.bool_)
        bits = np.unpackbits(packed, bitorder="little")[:vocabulary].astype(np.bool_)
        allowed[: len(bits)] = bits
        return torch.from_numpy(allowed)

    def accept(self, token: int) -> None:
        """Take one step. Raises GrammarError."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing more can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            self._give_up()
            raise GrammarError(f"structured_outputs cannot be followed: {_first(self._matcher.get_error())}")


class GrammarCache:
    """Compiled grammars, least recently used dropped first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._compiled: OrderedDict[tuple[_Spelling, str, str], LLMatcher] = OrderedDict()
        self._tokenizers: dict[_Spelling, LLTokenizer] = {}

    def start(self, base: Base, wanted: StructuredOutputs) -> GrammarMatcher:
        """A fresh grammar for one answer. Raises GrammarError."""
        key = (_spelling(base), wanted.kind, wanted.text())
        if key not in self._compiled:
            self._compiled[key] = self._compile(base, wanted)
        self._compiled.move_to_end(key)
        if len(self._compiled) > self._capacity:
            self._compiled.popitem(last=False)
        # What is too much for one answer is too much for the next: its memory, which is nobody's, is not worth keeping.
        return GrammarMatcher(self._compiled[key].deep_copy(), lambda: self._compiled.pop(key, None))

    def _compile(self, base: Base, wanted: StructuredOutputs) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer(base), _source(wanted), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(f"structured_outputs.{wanted.kind} is not accepted: {_first(matcher.get_error())}")
        return matcher

    def _tokenizer(self, base: Base) -> LLTokenizer:
        spelling = _spelling(base)
        if spelling not in self._tokenizers:
            self._tokenizers[spelling] = LLTokenizer(
                base.tokenizer.to_str(), eos_token=list(base.eos_ids) or None, slices=SLICES
            )
        return self._tokenizers[spelling]


def _spelling(base: Base) -> _Spelling:
    return base.tokenizer_digest, tuple(sorted(base.eos_ids))


def _source(wanted: StructuredOutputs) -> Any:
    if wanted.kind == "regex":
        return LLMatcher.grammar_from_regex(wanted.regex or "")
    if wanted.kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(f"({_escape(text)})" for text in wanted.choice or []))
    try:
        return LLMatcher.grammar_from_json_schema(json.loads(wanted.text()))
    except (ValueError, TypeError) as error:
        raise GrammarError(f"structured_outputs.json is not accepted: {_first(str(error))}") from error


def _escape(text: str) -> str:
    return re.sub(r"[^\w ]", lambda found: f"\\x{{{ord(found.group()):x}}}", text)


def _first(message: str) -> str:
    """The library's message without its dump of internal state."""
    return " ".join(message.split("<state>")[0].split())[:300]

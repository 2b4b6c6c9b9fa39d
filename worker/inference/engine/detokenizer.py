"""The text of one completion: decoded token by token, cut at stop strings, and sent as far as it is settled."""

from collections.abc import Sequence

from tokenizers import Tokenizer

CONTEXT_TOKENS = 6  # of the prompt's end, decoded along so that a leading space is kept
MAX_HELD_TOKENS = 8  # after so many, bytes that form no character are decoded as U+FFFD
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes a growing list of ids, holding back a character until its last byte is there."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window = list(prompt[-CONTEXT_TOKENS:])
        self._read = len(self._window)

    def push(self, token: int) -> str:
        """The text that this token settles, perhaps none."""
        self._window.append(token)
        before = self._decode(self._window[: self._read])
        now = self._decode(self._window)
        unfinished = now.endswith(REPLACEMENT) and len(self._window) - self._read < MAX_HELD_TOKENS
        if unfinished or len(now) <= len(before):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)


class AnswerText:
    """Text so far. After `stop` is set nothing more is added."""

    def __init__(self, stops: Sequence[str], keep_stop: bool) -> None:
        self._stops = stops
        self._keep_stop = keep_stop
        self._text = ""
        self._searched = self._sent = 0
        self.stop: str | None = None

    def add(self, text: str, search: bool = True) -> None:
        """Append text and cut it at the first stop string; text added without `search` is never cut."""
        self._text += text
        if not search:
            self._searched = len(self._text)
            return
        found = [(self._text.find(stop, self._searched), stop) for stop in self._stops]
        hits = [hit for hit in found if hit[0] >= 0]
        if hits:
            at, self.stop = min(hits)
            self._text = self._text[: at + len(self.stop) if self._keep_stop else at]
        else:
            self._searched = max(self._searched, len(self._text) - self._longest + 1)

    def take(self, final: bool) -> str:
        """What was not taken yet: all of it at the end, else what no stop string can still cut."""
        until = len(self._text) if final else max(self._sent, len(self._text) - self._longest + 1)
        text = self._text[self._sent : until]
        self._sent = until
        return text

    @property
    def _longest(self) -> int:
        return max(map(len, self._stops), default=1)

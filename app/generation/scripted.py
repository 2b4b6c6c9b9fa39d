"""A generator that returns scripted text, for tests and for embedding. It needs no inference server.

It follows the same contract: stop strings, allowed tokens, length, ids that decode to the text.
"""

import math
from collections.abc import Callable
from typing import Literal

from app.domain.encoding import Tokenization
from app.generation.base import GenerationRequest, GenerationResult

Script = Callable[[str, GenerationRequest], str]
"""(prompt as text, request) → the text that the model would write without a limit."""


class ScriptedGenerator:
    def __init__(self, tokens: Tokenization, script: Script) -> None:
        self._tokens = tokens
        self._script = script
        self.requests: list[GenerationRequest] = []

    def generate(self, request: GenerationRequest) -> GenerationResult:
        self.requests.append(request)
        written = self._script(self._tokens.decode(request.prompt), request)
        if request.allowed_token_ids is not None:
            return self._allowed(request, written)
        ids = tuple(self._tokens.encode(written))
        for end in range(1, min(len(ids), request.max_tokens) + 1):
            text = self._tokens.decode(ids[:end])
            if cuts := [text.index(stop) for stop in request.stop if stop in text]:
                return _generated(request, ids[:end], text[: min(cuts)], "stop")
        kept = ids[: request.max_tokens]
        return _generated(request, kept, self._tokens.decode(kept), "stop" if kept == ids else "length")

    def _allowed(self, request: GenerationRequest, written: str) -> GenerationResult:
        """The allowed token that begins the script's text, else the first allowed one. Its probability is 0.9."""
        allowed = request.allowed_token_ids or ()
        wanted = self._tokens.encode(written)[:1]
        chosen = wanted[0] if wanted and wanted[0] in allowed else allowed[0]
        rest = 0.1 / max(1, len(allowed) - 1)
        return GenerationResult(
            ids=(chosen,),
            text=self._tokens.decode([chosen]),
            finish_reason="length",
            first_logprobs={t: math.log(0.9 if t == chosen else rest) for t in allowed},
            prompt_tokens=len(request.prompt),
        )

    def check(self) -> None:
        return

    def close(self) -> None:
        return


def _generated(
    request: GenerationRequest, ids: tuple[int, ...], text: str, reason: Literal["stop", "length"]
) -> GenerationResult:
    return GenerationResult(ids=ids, text=text, finish_reason=reason, prompt_tokens=len(request.prompt))

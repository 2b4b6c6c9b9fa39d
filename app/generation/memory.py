"""Generation within one process, from a script: what ships beside the real thing, for tests and for embedding.

It keeps the same contract: stop strings, allowed tokens, length, ids that decode to the text.
"""

import math
from collections.abc import Callable

from app.domain.encoding import Tokenization
from app.generation.base import Generated, GenerationRequest

Script = Callable[[str, GenerationRequest], str]
"""(the prompt as text, the request) → what the model would write if nothing stopped it."""


class ScriptedGenerator:
    def __init__(self, tokens: Tokenization, script: Script) -> None:
        self._tokens = tokens
        self._script = script
        self.requests: list[GenerationRequest] = []

    def generate(self, request: GenerationRequest) -> Generated:
        self.requests.append(request)
        written = self._script(self._tokens.decode(request.prompt), request)
        if request.allowed_token_ids is not None:
            return self._allowed(request, written)
        ids = list(self._tokens.encode(written))
        cut = min((written.find(stop) for stop in request.stop if stop in written), default=None)
        if len(ids) > request.max_tokens:
            ids = ids[: request.max_tokens]
            text = self._tokens.decode(ids)
            reason = "length"
        else:
            text, reason = (written if cut is None else written[:cut]), "stop"
        if cut is not None and cut < len(text):
            text = written[:cut]
        return Generated.model_validate(
            {"ids": tuple(ids), "text": text, "finish_reason": reason, "prompt_tokens": len(request.prompt)}
        )

    def _allowed(self, request: GenerationRequest, written: str) -> Generated:
        """The allowed token that begins what the script wrote, else the first; it takes nine tenths."""
        allowed = request.allowed_token_ids or ()
        wanted = self._tokens.encode(written)[:1]
        chosen = wanted[0] if wanted and wanted[0] in allowed else allowed[0]
        rest = 0.1 / max(1, len(allowed) - 1)
        return Generated(
            ids=(chosen,),
            text=self._tokens.decode([chosen]),
            finish_reason="length",
            first_logprobs={t: math.log(0.9 if t == chosen else rest) for t in allowed},
            prompt_tokens=len(request.prompt),
        )

    def healthy(self) -> bool:
        return True

    def close(self) -> None:
        return

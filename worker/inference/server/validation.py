"""A body becomes a request, or is refused in words: what cannot be read, and what would ask too much of the engine.

Knows no HTTP and no processes; what only the model's files can tell is checked in `sequence`.
"""

from pydantic import ValidationError

from worker.inference.ipc import MAX_CANDIDATES
from worker.inference.protocol import CompletionRequest, ServedModel
from worker.inference.server.completion_handler import APIError

CHARACTERS = 64
"""Of a text prompt, for each position of its model: no text has fewer tokens, and to count them keeps the engine."""


def parse(body: bytes) -> CompletionRequest:
    """The request in a body. Raises APIError."""
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        param = str(first["loc"][0]) if first["loc"] else None
        message = first["msg"].removeprefix("Value error, ")
        raise APIError(400, f"{place}: {message}" if place else message, param) from None


def check(request: CompletionRequest, model: ServedModel) -> None:
    """Raise APIError where this model could not read the prompts, or the answers may be too long to be handed over."""
    texts = [len(prompt) for prompt in request.prompts() if isinstance(prompt, str)]
    longest, most = max(texts, default=0), CHARACTERS * model.max_model_len
    if longest > most:
        context = f"a context of {model.max_model_len} tokens takes at most {most}"
        raise APIError(400, f"prompt has {longest} characters, but {context}", "prompt")
    told = _candidates(request, model.max_model_len)
    if told > MAX_CANDIDATES:
        param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        words = f"{param} ask for up to {told} ranked tokens over all positions; at most {MAX_CANDIDATES} are told"
        raise APIError(400, f"{words}. Lower them, or ask for fewer tokens or prompts at once.", param)


def _candidates(request: CompletionRequest, context: int) -> int:
    """The most that the answers hold at once; a stream hands them over as they come. A token has at least one byte."""
    prompts = [len(prompt.encode() if isinstance(prompt, str) else prompt) for prompt in request.prompts()]
    read = sum(min(length, context) for length in prompts)
    written = 0 if request.stream else len(prompts) * min(request.max_tokens, context)
    return read * _ranked(request.prompt_logprobs) + written * _ranked(request.logprobs)


def _ranked(logprobs: int | None) -> int:
    """How many tokens a position tells of: its own besides the most probable ones."""
    return 0 if logprobs is None else logprobs + 1

"""Parses a request body, and refuses what would ask too much of the engine.

What only the model's files can tell is checked in `engine/sequence.py`.
"""

from pydantic import ValidationError

from app.domain.strict_json import RepeatedKeyError, parse_json
from worker.inference.errors import APIError
from worker.inference.ipc import MAX_CANDIDATES
from worker.inference.sampling_params import ServedModel
from worker.inference.server.protocol import CompletionRequest

MAX_CHARACTERS_PER_TOKEN = 64
"""A text prompt may have so many characters for each position of its model's context. Text that fits has fewer, and
tokenizing longer text would only occupy the engine."""


def parse_request(body: bytes) -> CompletionRequest:
    """Parse a body. Raises APIError, which names the field at fault."""
    try:
        request = CompletionRequest.model_validate_json(body)
        parse_json(body.decode())  # pydantic keeps the last value of a repeated key in silence
        return request
    except RepeatedKeyError as error:
        raise APIError(400, str(error), str(error.loc[0])) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        param = str(first["loc"][0]) if first["loc"] else None
        message = first["msg"].removeprefix("Value error, ")
        raise APIError(400, f"{path}: {message}" if path else message, param) from None


def check_request(request: CompletionRequest, model: ServedModel) -> None:
    """Raise APIError if the prompts exceed this model's context, or if the response might be too large to send."""
    texts = [len(prompt) for prompt in request.prompts() if isinstance(prompt, str)]
    longest, most = max(texts, default=0), MAX_CHARACTERS_PER_TOKEN * model.max_model_len
    if longest > most:
        context = f"a context of {model.max_model_len} tokens takes at most {most}"
        raise APIError(400, f"prompt has {longest} characters, but {context}", "prompt")
    num_ranked = _max_ranked_tokens(request, model.max_model_len)
    if num_ranked > MAX_CANDIDATES:
        param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        words = f"{param} ask for up to {num_ranked} ranked tokens over all positions; at most {MAX_CANDIDATES} may"
        raise APIError(400, f"{words}. Lower them, or ask for fewer tokens or prompts at once.", param)


def _max_ranked_tokens(request: CompletionRequest, context: int) -> int:
    """The most ranked tokens that the response holds at once; a stream sends those of completions as they come.

    A token has at least one byte.
    """
    prompts = [len(prompt.encode() if isinstance(prompt, str) else prompt) for prompt in request.prompts()]
    num_prompt = sum(min(length, context) for length in prompts)
    num_output = 0 if request.stream else len(prompts) * min(request.max_tokens, context)
    return num_prompt * _ranked_per_token(request.prompt_logprobs) + num_output * _ranked_per_token(request.logprobs)


def _ranked_per_token(logprobs: int | None) -> int:
    """Ranked tokens at one position: its own and the most probable ones."""
    return 0 if logprobs is None else logprobs + 1

"""The interface to an inference server: token ids in, token ids out."""

from typing import Literal, Protocol

from pydantic import Field

from app.domain.frozen import Frozen


class GenerationRequest(Frozen):
    """A request for one completion. `model`: digest of an adapter or of a served base.

    `logprobs`: number of alternatives to return for the first token, after masking by `allowed_token_ids`.
    `regex`: the completion must match it. `stop`: the text ends before the first of these strings.
    """

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    regex: str | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None


class GenerationResult(Frozen):
    """A completion.

    `text` ends before the stop string. `ids` are all sampled ids, those of the stop string included.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    first_logprobs: dict[int, float] = Field(default_factory=dict)
    prompt_tokens: int
    cached_tokens: int = 0


class Generator(Protocol):
    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Raises UnavailableError or BusyError if a retry may work, InvalidError if it cannot."""

    def check(self) -> None:
        """Checks that the server is up. Raises the errors of `generate`."""

    def close(self) -> None:
        """Closes all connections."""

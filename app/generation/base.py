"""What generation is asked and what it answers: token ids in, token ids out. Knows no prompt format."""

from typing import Literal, Protocol

from pydantic import Field

from app.domain.frozen import Frozen


class GenerationRequest(Frozen):
    """One continuation. `model` is a digest: an adapter's, or a served base's.

    `logprobs`: how many of the first token's alternatives to tell, from the distribution left after
    `allowed_token_ids`. `regex` bounds what may be written; `stop` ends it before the string.
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
    """`text` ends before the stop string; `ids` are all the ids that were sampled, those of the stop included."""

    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    first_logprobs: dict[int, float] = Field(default_factory=dict)
    prompt_tokens: int
    cached_tokens: int = 0


class Generator(Protocol):
    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Raises UnavailableError or BusyError (try again) and InvalidError (never will work)."""

    def check(self) -> None:
        """Ask whether the server would answer now. Raises what `generate` would."""

    def close(self) -> None:
        """Let go of connections."""

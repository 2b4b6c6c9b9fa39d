"""The OpenAI completions protocol: the body of `POST /v1/completions` and its response.

Names and shapes are those of vLLM, so one client serves both.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from worker.inference.sampling_params import ClientModel, FailFastList, FinishReason, Prompt, SamplingParams, TokenId

MAX_PROMPTS = 64

NOT_OFFERED = frozenset(
    [
        *("add_special_tokens", "bad_words", "best_of", "cache_salt", "ec_transfer_params", "frequency_penalty"),
        *("kv_transfer_params", "length_penalty", "logit_bias", "logprob_token_ids", "min_p", "presence_penalty"),
        *("priority", "prompt_embeds", "repetition_detection", "repetition_penalty", "request_id", "response_format"),
        *("session_id", "spaces_between_special_tokens", "stream_interval", "suffix", "thinking_token_budget", "top_k"),
        *("truncate_prompt_tokens", "truncation_side", "use_beam_search", "user", "vllm_xargs", "watermarking"),
    ]
)
"""Fields of vLLM's that clients send as null when they do not use them."""


class StreamOptions(ClientModel):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class CompletionRequest(SamplingParams, ClientModel):
    """The body of `POST /v1/completions`. `model` is a digest; `n` is 1 and `echo` false."""

    model: str = Field(min_length=1, max_length=256)
    prompt: str | FailFastList[TokenId] | FailFastList[str] | FailFastList[FailFastList[TokenId]]
    n: Literal[1] = 1
    echo: Literal[False] = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        unused = NOT_OFFERED | cls.model_fields.keys()
        return {name: value for name, value in data.items() if value is not None or name not in unused}

    @model_validator(mode="after")
    def _prompts_and_stream(self) -> "CompletionRequest":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only defined when stream is true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs are not available when stream is true")
        prompts = self.prompts()
        if not prompts or not all(prompts):
            raise ValueError("prompt is empty")
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"{len(prompts)} prompts in one request; at most {MAX_PROMPTS} are accepted")
        return self

    def prompts(self) -> list[Prompt]:
        """One item for each answer wanted."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return (
            [[int(item) for item in self.prompt if isinstance(item, int)]]
            if (not self.prompt or isinstance(self.prompt[0], int))
            else [item for item in self.prompt if not isinstance(item, int)]
        )

    def sampling(self) -> SamplingParams:
        """The part of the request that the engine reads."""
        return SamplingParams.model_construct(**{name: getattr(self, name) for name in SamplingParams.model_fields})


class CompletionLogProbs(BaseModel):
    """Log-probabilities of the distribution that was sampled from, in OpenAI's legacy layout."""

    text_offset: list[int] = []
    token_logprobs: list[float] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float]] = []


class PromptLogprob(BaseModel):
    """One token at one position of a prompt: its natural log-probability, its rank from 1 on, and its text."""

    logprob: float
    rank: int
    decoded_token: str


class Choice(BaseModel):
    """One answer, or one piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogProbs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | None = None


class PromptTokensDetails(BaseModel):
    """How many prompt tokens came out of the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts over all answers of a request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Completion(BaseModel):
    """The answer of `/v1/completions`; in a stream, one event of it (`usage` then only in the last)."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None

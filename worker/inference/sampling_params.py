"""What a completion is computed from: the served model that a digest names, and the sampling parameters.

Server and engine share these values. Names and shapes are those of vLLM's `/v1/completions`.
"""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from app.domain.frozen import Frozen

MAX_LOGPROBS = 20
MAX_REGEX = 4_096
MAX_CHOICES = 1_000
MAX_GRAMMAR = 65_536
MAX_DEPTH = 100  # of a schema; pydantic reads lines of 200 levels, of which a request has three around it
MAX_STOPS = 32
MAX_STOP_IDS = 1_024
MAX_ALLOWED_IDS = 65_536

Item = TypeVar("Item")
FailFastList = Annotated[list[Item], Field(fail_fast=True)]
"""A list of which the first wrong item is told: a million of them would take seconds and gigabytes to describe."""

TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1_024)]
FinishReason = Literal["stop", "length"]

Prompt = str | list[TokenId]


class ClientModel(Frozen):
    """A value that a client writes: of the fields that it has not, the first is told."""

    @model_validator(mode="before")
    @classmethod
    def _one_stranger(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {*known, next((name for name in data if name not in known), "")}
        return {name: value for name, value in data.items() if name in kept}


class ServedModel(Frozen):
    """What a digest stands for: a base model on disk, how it is quantised, and perhaps an adapter over it.

    `quantization` is None or `{"bits": 4 | 8, "type": "nf4" | "fp4", "double": bool}`; paths are directories of
    this machine; `max_model_len` counts prompt and answer tokens together.
    """

    digest: str
    base_digest: str
    base_path: str
    quantization: dict[str, Any] | None = None
    adapter_path: str | None = None
    max_model_len: int = Field(gt=0)


class StructuredOutputs(ClientModel):
    """A grammar the answer must follow: exactly one of a regular expression, choices, or a JSON schema."""

    regex: str | None = Field(None, min_length=1, max_length=MAX_REGEX)
    choice: FailFastList[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=MAX_CHOICES)
    json_schema: str | dict[str, Any] | None = Field(None, alias="json")

    @model_validator(mode="after")
    def _one_bounded_grammar(self) -> "StructuredOutputs":
        kinds = [self.regex, self.choice, self.json_schema]
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give exactly one of 'regex', 'choice' and 'json'")
        size = len(self.text())
        if size > MAX_GRAMMAR:
            raise ValueError(f"the grammar has {size} characters; at most {MAX_GRAMMAR} are accepted")
        if _depth(self.json_schema) > MAX_DEPTH:
            raise ValueError(f"the schema is nested in more than {MAX_DEPTH} levels")
        return self

    @property
    def kind(self) -> Literal["regex", "choice", "json"]:
        """Which of the three was given."""
        if self.regex is not None:
            return "regex"
        return "choice" if self.choice is not None else "json"

    def text(self) -> str:
        """The grammar as one string; equal grammars give equal strings."""
        given = self.regex or self.choice or self.json_schema
        return given if isinstance(given, str) else json.dumps(given, sort_keys=True)


class SamplingParams(Frozen):
    """How the answer is chosen and when it ends. Defaults are OpenAI's: temperature 1, 16 tokens.

    `deterministic`: computed in shapes of its own, so that no digit depends on what else is asked; slower.
    `prompt_logprobs`: the prompt's tokens are scored too, beside so many of the most probable ones, which reads all
    of the prompt.
    """

    max_tokens: int = Field(16, ge=1)
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: FailFastList[Stop] = Field(default=[], max_length=MAX_STOPS)
    stop_token_ids: FailFastList[TokenId] = Field(default=[], max_length=MAX_STOP_IDS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    allowed_token_ids: FailFastList[TokenId] | None = Field(None, min_length=1, max_length=MAX_ALLOWED_IDS)
    structured_outputs: StructuredOutputs | None = None
    deterministic: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _min_within_max(self) -> "SamplingParams":
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        return self


def _depth(value: object) -> int:
    """How many objects and lists lie within each other."""
    depth, level = 0, [value]
    while level := [inner for outer in level for inner in _within(outer)]:
        depth += 1
    return depth


def _within(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()

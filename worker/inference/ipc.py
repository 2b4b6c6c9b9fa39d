"""The words between the front and its engine: one JSON line a message, on the engine's stdin and stdout.

Knows no pipes: `link` and `engine` hold the two ends.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from app.domain.tuning_methods import MAX_RANK
from worker.inference.protocol import FinishReason, Frozen, Prompt, SamplingParams, ServedModel

MAX_LINE = 64 * 1024**2  # bytes
MAX_CANDIDATES = MAX_LINE // 256
"""Of a request's answers: each takes about 70 bytes of a line, and its text."""

_ID = re.compile(rb'\{"(?:op|event)":"\w+","id":"([^"\\]*)"')


class TopToken(Frozen):
    """One candidate at one position: its id, natural log-probability and text."""

    id: int
    logprob: float
    text: str


class RankedToken(TopToken):
    """One candidate at one position of a prompt, and how many are at least as probable there."""

    rank: int


class TokenLogprobs(Frozen):
    """One position of the answer: the chosen token and the candidates, most probable first."""

    chosen: TopToken
    top: list[TopToken]


class EngineSettings(Frozen):
    """What the front tells a fresh engine. Counts are sequences. `memory_bytes` is for the whole process, on its
    device; of what its libraries leave, `kv_bytes` (None: a quarter) are for keys and values of those who are
    answered, `prefix_cache_bytes` (None: a sixteenth) of those who were, and the rest is for bases and adapters.
    `host_bytes`: for adapters, where the device is a GPU. `heartbeat`: the longest time in seconds between two reports;
    an engine that is silent for ten times as long is taken for stuck.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = Field(None, ge=1)
    max_batch: int = Field(16, ge=1, le=256)
    slice_steps: int = Field(16, ge=1)
    memory_bytes: int = Field(8 * 1024**3, ge=1)
    host_bytes: int = Field(4 * 1024**3, ge=1)
    kv_bytes: int | None = Field(None, ge=1)
    prefix_cache_bytes: int | None = Field(None, ge=0)
    max_rank: int = Field(MAX_RANK, ge=1)
    max_grammars: int = Field(256, ge=1)
    heartbeat: float = Field(30.0, gt=0)


class Configure(Frozen):
    """Front to engine, once and first."""

    op: Literal["configure"] = "configure"
    settings: EngineSettings


class Generate(Frozen):
    """Front to engine: one answer is wanted. With `stream`, pieces are sent as they come."""

    op: Literal["generate"] = "generate"
    id: str
    model: ServedModel
    prompt: Prompt
    sampling: SamplingParams
    stream: bool = False


class Preload(Frozen):
    """Front to engine: this model will probably be asked for."""

    op: Literal["expect"] = "expect"
    model: ServedModel


class Cancel(Frozen):
    """Front to engine: nobody waits for this answer any more."""

    op: Literal["cancel"] = "cancel"
    id: str


class Ready(Frozen):
    """Engine to front, once: requests may come."""

    event: Literal["ready"] = "ready"
    pid: int
    device: str
    dtype: str


class Chunk(Frozen):
    """Engine to front: tokens of a streamed answer since the last piece, and the text that is settled.

    The first piece carries the prompt's ids, later ones an empty list.
    """

    event: Literal["piece"] = "piece"
    id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_token_ids: list[int]


class Finished(Frozen):
    """Engine to front: the rest of the answer (all of it, unless pieces were sent) and why it ended.

    `prompt_logprobs`, where asked for: the prompt's own token and the most probable ones, for all but the first.
    """

    event: Literal["finished"] = "finished"
    id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    prompt_token_ids: list[int]
    prompt_logprobs: list[list[RankedToken] | None] | None = None
    cached_tokens: int
    completion_tokens: int


class Failed(Frozen):
    """Engine to front: this request has no answer. `status` is the HTTP status that says so."""

    event: Literal["failed"] = "failed"
    id: str
    status: int
    message: str
    param: str | None = None


class Stats(Frozen):
    """Engine to front: gauges, and counters since the engine started."""

    event: Literal["stats"] = "stats"
    running: int = 0
    waiting: int = 0
    adapters: int = 0
    bases: int = 0
    prefix_cache_bytes: int = 0
    prefills: int = 0
    decode_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


EngineMessage = Configure | Generate | Preload | Cancel
ServerMessage = Ready | Chunk | Finished | Failed | Stats

_TO_ENGINE: TypeAdapter[EngineMessage] = TypeAdapter(Annotated[EngineMessage, Field(discriminator="op")])
_TO_FRONT: TypeAdapter[ServerMessage] = TypeAdapter(Annotated[ServerMessage, Field(discriminator="event")])


def line(message: EngineMessage | ServerMessage) -> bytes:
    """A message as one line of JSON."""
    return message.model_dump_json(by_alias=True, exclude_defaults=False).encode() + b"\n"


def decode_engine_message(raw: bytes) -> EngineMessage:
    """Read a line that the front wrote. Raises pydantic's ValidationError."""
    return _TO_ENGINE.validate_json(raw)


def decode_server_message(raw: bytes) -> ServerMessage:
    """Read a line that the engine wrote. Raises pydantic's ValidationError."""
    return _TO_FRONT.validate_json(raw)


def request_id_of(raw: bytes) -> str:
    """Whose line this is, as far as that can be told of one that cannot be read; else nothing."""
    found = _ID.match(raw)
    return found[1].decode(errors="replace") if found else ""

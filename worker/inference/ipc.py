"""The messages between the server and its engine: one JSON line each, on the engine's stdin and stdout."""

import re
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from app.domain.frozen import Frozen
from app.domain.tuning_methods import MAX_RANK
from worker.inference.sampling_params import FinishReason, Prompt, SamplingParams, ServedModel

MAX_LINE = 64 * 1024**2  # bytes
MAX_CANDIDATES = MAX_LINE // 256
"""Ranked tokens in one request's completions: each takes about 70 bytes of a line, and its text."""

_ID = re.compile(rb'\{"(?:op|event)":"\w+","id":"([^"\\]*)"')


class TopToken(Frozen):
    """One candidate at one position: its id, natural log-probability and text."""

    id: int
    logprob: float
    text: str


class RankedToken(TopToken):
    """One candidate at one position of a prompt. `rank` is 1 for the most probable token."""

    rank: int


class TokenLogprobs(Frozen):
    """One position of the completion: the sampled token and the candidates, most probable first."""

    chosen: TopToken
    top: list[TopToken]


class EngineSettings(Frozen):
    """An engine's settings.

    - `max_batch`: sequences that run at once, over all batches.
    - `slice_steps`: steps of one batch before the next has its turn.
    - `memory_bytes`: for the whole process, on its device. Of what its libraries leave, `kv_bytes` (None: a quarter) is
      for KV caches of running sequences, `prefix_cache_bytes` (None: a sixteenth) for the prefix cache, and the rest
      for bases and adapters.
    - `host_bytes`: for adapters, if the device is a GPU.
    - `heartbeat`: the longest time between two reports, in seconds. After ten times as long the engine counts as stuck.
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
    """Server to engine: the first message."""

    op: Literal["configure"] = "configure"
    settings: EngineSettings


class Generate(Frozen):
    """Server to engine: complete one prompt. With `stream`, the engine sends chunks."""

    op: Literal["generate"] = "generate"
    id: str
    model: ServedModel
    prompt: Prompt
    sampling: SamplingParams
    stream: bool = False


class Preload(Frozen):
    """Server to engine: load this model while there is nothing else to do."""

    op: Literal["preload"] = "preload"
    model: ServedModel


class Cancel(Frozen):
    """Server to engine: stop working on this request."""

    op: Literal["cancel"] = "cancel"
    id: str


class EngineReady(Frozen):
    """Engine to server, once: it accepts requests.

    `batch_invariant`: whether the kernels passed the self-check, so that an answer does not depend on other requests.
    """

    event: Literal["ready"] = "ready"
    pid: int
    device: str
    dtype: str
    batch_invariant: bool = False


class Chunk(Frozen):
    """Engine to server: the tokens since the last chunk, and the text that is settled.

    The first chunk has the prompt's ids, later ones an empty list.
    """

    event: Literal["chunk"] = "chunk"
    id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_token_ids: list[int]


class Finished(Frozen):
    """Engine to server: the rest of the completion (all of it, unless chunks were sent) and why it ended.

    `prompt_logprobs`, if asked for: the prompt's own token and the most probable ones, for all but the first.
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
    """Engine to server: the request failed. `status` is the HTTP status."""

    event: Literal["failed"] = "failed"
    id: str
    status: int
    message: str
    param: str | None = None


class Stats(Frozen):
    """Engine to server: gauges, and counters since the engine started."""

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


EngineInput = Configure | Generate | Preload | Cancel
EngineOutput = EngineReady | Chunk | Finished | Failed | Stats

_TO_ENGINE: TypeAdapter[EngineInput] = TypeAdapter(Annotated[EngineInput, Field(discriminator="op")])
_TO_FRONT: TypeAdapter[EngineOutput] = TypeAdapter(Annotated[EngineOutput, Field(discriminator="event")])


def decode_engine_input(raw: bytes) -> EngineInput:
    """Parse a line from the server. Raises pydantic's ValidationError."""
    return _TO_ENGINE.validate_json(raw)


def decode_engine_output(raw: bytes) -> EngineOutput:
    """Parse a line from the engine. Raises pydantic's ValidationError."""
    return _TO_FRONT.validate_json(raw)


def request_id_of(raw: bytes) -> str:
    """The request id in an unparseable line, if it can be found; else an empty string."""
    found = _ID.match(raw)
    return found[1].decode(errors="replace") if found else ""

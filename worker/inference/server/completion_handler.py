"""Completes one request: sends its prompts to the engine, and builds the response, whole or as server-sent events.

Shapes are vLLM's.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from worker.inference.errors import APIError
from worker.inference.ipc import Chunk, EngineOutput, Failed, Finished, Generate, RankedToken, TokenLogprobs, TopToken
from worker.inference.sampling_params import ServedModel
from worker.inference.server.engine_client import EngineClient
from worker.inference.server.metrics import Metrics
from worker.inference.server.protocol import (
    Choice,
    Completion,
    CompletionLogProbs,
    CompletionRequest,
    PromptLogprob,
    PromptTokensDetails,
    Usage,
)

DONE = b"data: [DONE]\n\n"


class CompletionHandler:
    """The completions of one request. Call `submit`, then `complete` or `stream`, and `cancel` in any case."""

    def __init__(self, engine: EngineClient, metrics: Metrics, request: CompletionRequest, served: ServedModel) -> None:
        self._engine = engine
        self._metrics = metrics
        self._request = request
        self._served = served
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created, self._began = int(time.time()), time.monotonic()
        self._messages: asyncio.Queue[EngineOutput] = asyncio.Queue()
        self._indexes: dict[str, int] = {}
        self._has_prompt_ids: set[str] = set()
        self._has_first_token = False
        self.seconds = 0.0

    def submit(self) -> None:
        """Send every prompt to the engine. Raises EngineUnavailable."""
        for index, prompt in enumerate(self._request.prompts()):
            request_id = f"{self._id}-{index}"
            self._indexes[request_id] = index
            generate = Generate(
                id=request_id,
                model=self._served,
                prompt=prompt,
                sampling=self._request.sampling(),
                stream=self._request.stream,
            )
            self._engine.submit(generate, self._messages.put_nowait)

    def cancel(self) -> None:
        """Cancel the completions that are not finished."""
        for request_id in self._indexes:
            self._engine.cancel(request_id)

    async def complete(self) -> Completion:
        """The whole response. Raises APIError."""
        messages = [message async for message in self._receive()]
        finished = {message.id: message for message in messages if isinstance(message, Finished)}
        ordered = [finished[request_id] for request_id in self._indexes]
        choices = [self._build_choice(message, 0) for message in ordered]
        return self._build_completion(choices, _count_usage(ordered))

    async def stream(self) -> AsyncIterator[bytes]:
        """The response as server-sent events. Raises APIError only before the first event."""
        offsets = dict.fromkeys(self._indexes, 0)
        finished: list[Finished] = []
        try:
            async for message in self._receive():
                choice = self._build_choice(message, offsets[message.id])
                offsets[message.id] += sum(len(position.chosen.text) for position in message.logprobs or [])
                finished += [message] if isinstance(message, Finished) else []
                yield _event(self._build_completion([choice]).model_dump(exclude={"usage"}))
        except APIError as error:
            if not self._has_first_token:
                raise
            yield _event(error.body())
        else:
            if self._request.stream_options and self._request.stream_options.include_usage:
                yield _event(self._build_completion([], _count_usage(finished)).model_dump())
        yield DONE

    async def _receive(self) -> AsyncIterator[Chunk | Finished]:
        unfinished = len(self._indexes)
        while unfinished:
            message = await self._messages.get()
            if isinstance(message, Failed):
                raise APIError(message.status, message.message, message.param)
            assert isinstance(message, Chunk | Finished)
            self._observe(message)
            unfinished -= isinstance(message, Finished)
            yield message

    def _observe(self, message: Chunk | Finished) -> None:
        self.seconds = time.monotonic() - self._began
        if not self._has_first_token:
            self._has_first_token = True
            self._metrics.first_token.observe(self.seconds)
        if isinstance(message, Finished):
            self._metrics.success.labels(message.finish_reason).inc()
            self._metrics.latency.observe(self.seconds)

    def _build_choice(self, message: Chunk | Finished, offset: int) -> Choice:
        choice = Choice(index=self._indexes[message.id], text=message.text)
        if message.logprobs is not None:
            as_ids = self._request.return_tokens_as_token_ids
            choice.logprobs = _logprobs(message.logprobs, offset, as_ids)
        if self._request.return_token_ids:
            choice.token_ids = message.token_ids
            is_first = message.id not in self._has_prompt_ids
            choice.prompt_token_ids = message.prompt_token_ids if is_first else None
            self._has_prompt_ids.add(message.id)
        if isinstance(message, Finished):
            choice.finish_reason, choice.stop_reason = message.finish_reason, message.stop_reason
            choice.prompt_logprobs = _prompt_logprobs(message.prompt_logprobs)
        return choice

    def _build_completion(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._request.model, choices=choices, usage=usage)


def _count_usage(finished: list[Finished]) -> Usage:
    prompt = sum(len(message.prompt_token_ids) for message in finished)
    answer = sum(message.completion_tokens for message in finished)
    cached = sum(message.cached_tokens for message in finished)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=answer,
        total_tokens=prompt + answer,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def _logprobs(positions: list[TokenLogprobs], offset: int, as_ids: bool) -> CompletionLogProbs:
    """OpenAI's legacy layout: four parallel lists. `top_logprobs` has the sampled token and the most probable ones."""

    def name(token: TopToken) -> str:
        return f"token_id:{token.id}" if as_ids else token.text

    logprobs = CompletionLogProbs()
    for position in positions:
        logprobs.text_offset.append(offset)
        logprobs.tokens.append(name(position.chosen))
        logprobs.token_logprobs.append(position.chosen.logprob)
        logprobs.top_logprobs.append({name(token): token.logprob for token in [position.chosen, *position.top]})
        offset += len(position.chosen.text)
    return logprobs


def _prompt_logprobs(positions: list[list[RankedToken] | None] | None) -> list[dict[int, PromptLogprob] | None] | None:
    if positions is None:
        return None
    return [None if tokens is None else {token.id: _ranked(token) for token in tokens} for tokens in positions]


def _ranked(token: RankedToken) -> PromptLogprob:
    return PromptLogprob(logprob=token.logprob, rank=token.rank, decoded_token=token.text)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

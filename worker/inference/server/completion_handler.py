"""One HTTP request's conversation with the engine, and the completion it becomes, whole or in events.

Shapes are vLLM's. Knows no sockets: the front reads requests and writes responses.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from worker.inference.ipc import Chunk, Failed, Finished, Generate, RankedToken, ServerMessage, TokenLogprobs, TopToken
from worker.inference.protocol import (
    Choice,
    Completion,
    CompletionLogProbs,
    CompletionRequest,
    PromptLogprob,
    PromptTokensDetails,
    ServedModel,
    Usage,
)
from worker.inference.server.engine_client import EngineClient
from worker.inference.server.metrics import Metrics

DONE = b"data: [DONE]\n\n"


ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


class APIError(Exception):
    """The request gets an error: HTTP status, message, the field at fault, seconds to wait."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        fallback = "InternalServerError" if self.status >= 500 else "BadRequestError"
        kind = ERROR_TYPES.get(self.status, fallback)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


class CompletionHandler:
    """The answers to one request's prompts. `open` it, read it once, `close` it in any case."""

    def __init__(self, link: EngineClient, metrics: Metrics, request: CompletionRequest, served: ServedModel) -> None:
        self._link = link
        self._metrics = metrics
        self._request = request
        self._served = served
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created, self._began = int(time.time()), time.monotonic()
        self._inbox: asyncio.Queue[ServerMessage] = asyncio.Queue()
        self._indexes: dict[str, int] = {}
        self._told: set[str] = set()
        self._seen_first = False
        self.seconds = 0.0

    def open(self) -> None:
        """Ask for every answer. Raises EngineUnavailable."""
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
            self._link.submit(generate, self._inbox.put_nowait)

    def close(self) -> None:
        """Cancel what is still being answered."""
        for request_id in self._indexes:
            self._link.cancel(request_id)

    async def whole(self) -> Completion:
        """All answers in one. Raises APIError."""
        messages = [message async for message in self._messages()]
        finished = {message.id: message for message in messages if isinstance(message, Finished)}
        ordered = [finished[request_id] for request_id in self._indexes]
        choices = [self._choice(message, 0) for message in ordered]
        return self._completion(choices, _usage(ordered))

    async def events(self) -> AsyncIterator[bytes]:
        """The answers as server-sent events. Raises APIError only before the first event."""
        offsets = dict.fromkeys(self._indexes, 0)
        finished: list[Finished] = []
        try:
            async for message in self._messages():
                choice = self._choice(message, offsets[message.id])
                offsets[message.id] += sum(len(position.chosen.text) for position in message.logprobs or [])
                finished += [message] if isinstance(message, Finished) else []
                yield _event(self._completion([choice]).model_dump(exclude={"usage"}))
        except APIError as refused:
            if not self._seen_first:
                raise
            yield _event(refused.body())
        else:
            if self._request.stream_options and self._request.stream_options.include_usage:
                yield _event(self._completion([], _usage(finished)).model_dump())
        yield DONE

    async def _messages(self) -> AsyncIterator[Chunk | Finished]:
        missing = len(self._indexes)
        while missing:
            message = await self._inbox.get()
            if isinstance(message, Failed):
                raise APIError(message.status, message.message, message.param)
            assert isinstance(message, Chunk | Finished)
            self._observe(message)
            missing -= isinstance(message, Finished)
            yield message

    def _observe(self, message: Chunk | Finished) -> None:
        self.seconds = time.monotonic() - self._began
        if not self._seen_first:
            self._seen_first = True
            self._metrics.first_token.observe(self.seconds)
        if isinstance(message, Finished):
            self._metrics.success.labels(message.finish_reason).inc()
            self._metrics.latency.observe(self.seconds)

    def _choice(self, message: Chunk | Finished, offset: int) -> Choice:
        choice = Choice(index=self._indexes[message.id], text=message.text)
        if message.logprobs is not None:
            as_ids = self._request.return_tokens_as_token_ids
            choice.logprobs = _logprobs(message.logprobs, offset, as_ids)
        if self._request.return_token_ids:
            choice.token_ids = message.token_ids
            is_first = message.id not in self._told
            choice.prompt_token_ids = message.prompt_token_ids if is_first else None
            self._told.add(message.id)
        if isinstance(message, Finished):
            choice.finish_reason, choice.stop_reason = message.finish_reason, message.stop_reason
            choice.prompt_logprobs = _prompt_logprobs(message.prompt_logprobs)
        return choice

    def _completion(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._request.model, choices=choices, usage=usage)


def _usage(finished: list[Finished]) -> Usage:
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
    """Legacy layout: four parallel lists; `top` holds the chosen token and then the most probable ones."""

    def name(token: TopToken) -> str:
        return f"token_id:{token.id}" if as_ids else token.text

    answer = CompletionLogProbs()
    for position in positions:
        answer.text_offset.append(offset)
        answer.tokens.append(name(position.chosen))
        answer.token_logprobs.append(position.chosen.logprob)
        answer.top_logprobs.append({name(token): token.logprob for token in [position.chosen, *position.top]})
        offset += len(position.chosen.text)
    return answer


def _prompt_logprobs(positions: list[list[RankedToken] | None] | None) -> list[dict[int, PromptLogprob] | None] | None:
    if positions is None:
        return None
    return [None if tokens is None else {token.id: _ranked(token) for token in tokens} for tokens in positions]


def _ranked(token: RankedToken) -> PromptLogprob:
    return PromptLogprob(logprob=token.logprob, rank=token.rank, decoded_token=token.text)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

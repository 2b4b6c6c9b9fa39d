"""Completes requests over one engine: authorization, limits on the queue, model look-up, errors.

The queue is bounded: 429 if it is full, 503 while no engine is ready.
"""

import asyncio
import hmac
import logging
import math
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field, SecretStr

from app.asgi import wait_for_disconnect
from app.domain.frozen import Frozen
from worker.inference.errors import APIError, ClientDisconnected, EngineUnavailable, ModelNotFound
from worker.inference.ipc import EngineSettings
from worker.inference.sampling_params import ServedModel
from worker.inference.server.completion_handler import CompletionHandler
from worker.inference.server.engine_client import START_LIMIT, EngineClient
from worker.inference.server.metrics import Metrics
from worker.inference.server.model_resolver import ModelResolver
from worker.inference.server.resolved_models import ResolvedModels
from worker.inference.server.validation import check_request, parse_request

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SHARE_FOR_OTHER_MODELS = 4
"""A crowd at one model leaves one in so many of the queue to other models."""

LOOKUP_RETRY_AFTER = 5
"""Seconds after which to retry if a model could not be looked up."""


class ServerSettings(Frozen):
    """A server's settings.

    - `secret`: guards `/v1`.
    - `max_in_flight`: completions that run or wait.
    - `max_body`: of a request, in bytes.
    - `start_limit`: seconds until an engine is ready; then another one is started.
    """

    secret: SecretStr | None = None
    max_in_flight: int = Field(256, ge=1)
    max_body: int = Field(8 * 1024**2, ge=1)
    start_limit: float = Field(START_LIMIT, gt=0)
    engine: EngineSettings = EngineSettings()


class CompletionService:
    """The state behind the routes: one engine, the models that requests have named, and the metrics."""

    def __init__(self, resolver: ModelResolver, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.engine = EngineClient(settings.engine, self.metrics.update, settings.start_limit)
        self.models = ResolvedModels(resolver.resolve)
        self._typical_seconds = 1.0  # of a completion, a moving average

    def authorize(self, request: Request) -> None:
        """Raise APIError unless the request carries the secret, if there is one."""
        if self.settings.secret is None:
            return
        expected = f"Bearer {self.settings.secret.get_secret_value()}".encode()
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, expected):
            raise APIError(401, "the bearer secret is missing or wrong")

    async def complete(self, request: Request) -> Response:
        """Respond to one completions request."""
        body = parse_request(await self._read_body(request))
        self._check_queue(body.model, len(body.prompts()))
        served = await self._resolve(body.model)
        check_request(body, served)
        self._check_queue(body.model, len(body.prompts()))  # again: others came during the look-up
        handler = CompletionHandler(self.engine, self.metrics, body, served)
        try:
            handler.submit()
            respond = self._respond_stream if body.stream else self._respond_whole
            return await respond(handler, request)
        except ClientDisconnected:
            return Response(status_code=499)
        except APIError as error:
            if error.param == "model":
                self.models.invalidate(body.model)  # it may have been published anew, or deleted
            raise self._with_retry_after(error) from None
        except EngineUnavailable as error:
            raise APIError(503, str(error), retry_after=error.retry_after) from None

    async def _respond_whole(self, handler: CompletionHandler, request: Request) -> Response:
        try:
            completion = await _unless_disconnected(handler.complete(), request)
            self._typical_seconds += 0.2 * (handler.seconds - self._typical_seconds)
            return Response(completion.model_dump_json(), media_type="application/json")
        finally:
            handler.cancel()

    async def _respond_stream(self, handler: CompletionHandler, request: Request) -> Response:
        events = handler.stream()
        try:
            first = await _unless_disconnected(anext(events), request)  # before the status is sent: it may be an error
        except BaseException:
            handler.cancel()
            raise
        return StreamingResponse(_stream(first, events, handler), media_type="text/event-stream")

    async def _resolve(self, digest: str) -> ServedModel:
        try:
            return await self.models.resolve(digest)
        except ModelNotFound:
            raise APIError(404, f"The model `{digest}` does not exist.", "model") from None
        except Exception:
            log.exception("model %s could not be looked up", digest)
            message = "the model cannot be looked up now; try again soon"
            raise APIError(503, message, retry_after=LOOKUP_RETRY_AFTER) from None

    async def _read_body(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.settings.max_body:
                raise APIError(413, f"the request is larger than {self.settings.max_body} bytes")
        return bytes(body)

    def _check_queue(self, model: str, wanted: int) -> None:
        """Raise APIError: 503 if no engine is ready, 429 if the queue is full, or full of requests for this model."""
        if not self.engine.ready:
            raise APIError(503, self.engine.unavailable_reason, retry_after=self.engine.retry_after)
        limit, of_model = self.settings.max_in_flight, self.engine.in_flight_of(model)
        if self.engine.in_flight + wanted > limit:
            raise self._too_many(self.engine.in_flight, "requests are in flight already")
        if of_model + wanted > limit - limit // SHARE_FOR_OTHER_MODELS:
            reason = "requests for this model are in flight already; the rest of the queue is for others"
            raise self._too_many(of_model, reason)

    def _too_many(self, count: int, reason: str) -> APIError:
        rounds = self.engine.in_flight / self.settings.engine.max_batch
        return APIError(429, f"{count} {reason}", retry_after=max(1, math.ceil(self._typical_seconds * rounds)))

    def _with_retry_after(self, error: APIError) -> APIError:
        if error.status == 503 and error.retry_after is None:
            error.retry_after = self.engine.retry_after
        return error


async def _unless_disconnected(work: Awaitable[Result], request: Request) -> Result:
    """The result of `work`. Cancels it and raises ClientDisconnected as soon as the client has disconnected."""
    result, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({result, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnected
        return result.result()
    finally:
        result.cancel()
        disconnected.cancel()


async def _stream(first: bytes, rest: AsyncIterator[bytes], handler: CompletionHandler) -> AsyncIterator[bytes]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        handler.cancel()

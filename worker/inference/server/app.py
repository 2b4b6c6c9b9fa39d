"""The front: the completions protocol over HTTP, in front of one engine process.

It bounds the queue, turns digests into models, says 503 while the engine is away and 429 when too many wait.
It loads no torch and knows no tensors.
"""

import asyncio
import contextlib
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Protocol, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field, SecretStr
from starlette.exceptions import HTTPException

from app.asgi import RequestNormalizer, wait_for_disconnect
from worker.inference.ipc import EngineSettings
from worker.inference.protocol import Frozen, ServedModel
from worker.inference.server.completion_handler import APIError, CompletionHandler
from worker.inference.server.device_reservation import DeviceReservation, ReservationKeeper
from worker.inference.server.engine_client import START_LIMIT, EngineClient, EngineUnavailable
from worker.inference.server.metrics import Metrics
from worker.inference.server.preloader import Preloader, PreloadSource
from worker.inference.server.resolved_models import ResolvedModels
from worker.inference.server.validation import check, parse

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

KEPT_FOR_OTHERS = 4
"""One part in so many of the queue that a crowd at one model leaves free."""

ASK_AGAIN = 5
"""Seconds after which to come back where a model cannot be looked up: whoever knows is away."""


class ClientDisconnected(Exception):
    """Nobody reads the answer any more."""


class ModelNotFound(Exception):
    """No adapter and no served base has this digest."""


class ModelResolver(PreloadSource, Protocol):
    """Turns a digest into what the engine loads. Called in a thread; answers are remembered."""

    def resolve(self, digest: str) -> ServedModel:
        """The model, or ModelNotFound."""
        ...


class StaticResolver:
    """A fixed table of models, of which some are `expected`: for one machine without an application, and for tests."""

    def __init__(self, models: dict[str, ServedModel], expected: Sequence[str] = ()) -> None:
        self._models = models
        self._expected = [models[digest] for digest in expected]

    def expected(self) -> list[ServedModel]:
        """Always the same."""
        return self._expected

    def resolve(self, digest: str) -> ServedModel:
        """The model, or ModelNotFound."""
        if digest not in self._models:
            raise ModelNotFound(digest)
        return self._models[digest]


class ServerSettings(Frozen):
    """What a front is told. `secret` guards `/v1`; `max_in_flight` counts answers, decoding and waiting; an engine is
    ready in `start_limit` seconds, or another one is started."""

    secret: SecretStr | None = None
    max_in_flight: int = Field(256, ge=1)
    max_body: int = Field(8 * 1024**2, ge=1)
    start_limit: float = Field(START_LIMIT, gt=0)
    engine: EngineSettings = EngineSettings()


class CompletionService:
    """The state behind the routes: one engine, the models it was asked for, the numbers."""

    def __init__(self, resolver: ModelResolver, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.link = EngineClient(settings.engine, self.metrics.take, settings.start_limit)
        self.catalogue = ResolvedModels(resolver.resolve)
        self._typical_seconds = 1.0

    def authorize(self, request: Request) -> None:
        """Raise APIError unless the request carries the secret, where there is one."""
        if self.settings.secret is None:
            return
        expected = f"Bearer {self.settings.secret.get_secret_value()}".encode()
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, expected):
            raise APIError(401, "the bearer secret is missing or wrong")

    async def complete(self, request: Request) -> Response:
        """Answer one completions request."""
        body = parse(await self._body(request))
        self._check_room(body.model, len(body.prompts()))
        served = await self._resolve(body.model)
        check(body, served)
        self._check_room(body.model, len(body.prompts()))  # once more: others came while it was asked for
        exchange = CompletionHandler(self.link, self.metrics, body, served)
        try:
            exchange.open()
            answer = self._stream if body.stream else self._whole
            return await answer(exchange, request)
        except ClientDisconnected:
            return Response(status_code=499)
        except APIError as refused:
            if refused.param == "model":
                self.catalogue.forget(body.model)  # it may have been published anew, or be gone
            raise self._with_hint(refused) from None
        except EngineUnavailable as away:
            raise APIError(503, str(away), retry_after=away.retry_after) from None

    async def _whole(self, exchange: CompletionHandler, request: Request) -> Response:
        try:
            completion = await _while_read(exchange.whole(), request)
            self._typical_seconds += 0.2 * (exchange.seconds - self._typical_seconds)
            return Response(completion.model_dump_json(), media_type="application/json")
        finally:
            exchange.close()

    async def _stream(self, exchange: CompletionHandler, request: Request) -> Response:
        events = exchange.events()
        try:
            first = await _while_read(anext(events), request)  # so that a refusal still has a status of its own
        except BaseException:
            exchange.close()
            raise
        return StreamingResponse(_chain(first, events, exchange), media_type="text/event-stream")

    async def _resolve(self, digest: str) -> ServedModel:
        try:
            return await self.catalogue.find(digest)
        except ModelNotFound:
            raise APIError(404, f"The model `{digest}` does not exist.", "model") from None
        except Exception:
            log.exception("the model %s could not be looked up", digest)
            raise APIError(503, "the model cannot be looked up now; try again soon", retry_after=ASK_AGAIN) from None

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.settings.max_body:
                raise APIError(413, f"the request is larger than {self.settings.max_body} bytes")
        return bytes(body)

    def _check_room(self, model: str, wanted: int) -> None:
        if not self.link.ready:
            raise APIError(503, self.link.why, retry_after=self.link.retry_after)
        most, own = self.settings.max_in_flight, self.link.in_flight_of(model)
        if self.link.in_flight + wanted > most:
            raise self._busy(self.link.in_flight, "requests are in flight already")
        if own + wanted > most - most // KEPT_FOR_OTHERS:
            raise self._busy(own, "requests for this model are in flight already; the rest of the queue is for others")

    def _busy(self, ahead: int, why: str) -> APIError:
        rounds = self.link.in_flight / self.settings.engine.max_batch
        return APIError(429, f"{ahead} {why}", retry_after=max(1, math.ceil(self._typical_seconds * rounds)))

    def _with_hint(self, refused: APIError) -> APIError:
        if refused.status == 503 and refused.retry_after is None:
            refused.retry_after = self.link.retry_after
        return refused


def create_inference_app(
    resolver: ModelResolver, settings: ServerSettings | None = None, tenancy: DeviceReservation | None = None
) -> FastAPI:
    """The inference service; its lifespan starts the engine and ends it. Without a tenancy the device is its own."""
    front = CompletionService(resolver, settings or ServerSettings())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        residence = ReservationKeeper(front.link, tenancy) if tenancy else None
        parts = (Preloader(front.link, resolver), residence, front.link)
        running = [asyncio.create_task(part.run()) for part in parts if part]
        yield
        for task in running[:-1]:  # nobody wakes it any more
            await _cancel(task)
        await front.link.stop()
        await _cancel(running[-1])
        if residence:
            await residence.leave()

    app = FastAPI(title="Veritune inference", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(RequestNormalizer)
    app.state.front = front
    _add_errors(app, front)
    _add_routes(app, front)
    return app


def _add_routes(app: FastAPI, front: CompletionService) -> None:
    guarded = [Depends(front.authorize)]

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(request: Request) -> Response:
        return await front.complete(request)

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_card(model) for model in front.catalogue.models()]})

    @app.get("/health")
    async def health() -> Response:
        if front.link.ready:
            return Response(status_code=200)
        raise APIError(503, front.link.why, retry_after=front.link.retry_after)

    @app.get("/metrics")
    async def metrics() -> Response:
        front.metrics.engine_up.set(front.link.ready)
        front.metrics.engine_resting.set(front.link.resting)
        front.metrics.engine_starts.set(front.link.starts)
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI, front: CompletionService) -> None:
    @app.exception_handler(APIError)
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        front.metrics.refused.labels(str(error.status)).inc()
        return _error(error)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(APIError(error.status_code, str(error.detail)), error.headers)


def _error(error: APIError, headers: Mapping[str, str] | None = None) -> Response:
    waiting = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body(), error.status, {**(headers or {}), **waiting})


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _card(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.digest,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "veritune",
        "root": model.digest,
        "parent": model.base_digest if model.adapter_path else None,
        "max_model_len": model.max_model_len,
    }


async def _while_read(answer: Awaitable[Answer], request: Request) -> Answer:
    """The answer. Raises ClientDisconnected as soon as whoever asked has left."""
    coming, gone = asyncio.ensure_future(answer), asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise ClientDisconnected
        return coming.result()
    finally:
        coming.cancel()
        gone.cancel()


async def _chain(first: bytes, rest: AsyncIterator[bytes], exchange: CompletionHandler) -> AsyncIterator[bytes]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        exchange.close()

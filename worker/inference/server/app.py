"""The inference server: the completions protocol over HTTP, in front of one engine process. It loads no torch."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from app.asgi import RequestNormalizer
from worker.inference.errors import APIError
from worker.inference.sampling_params import ServedModel
from worker.inference.server.completion_service import CompletionService, ServerSettings
from worker.inference.server.device_reservation import DeviceReservation, ReservationKeeper
from worker.inference.server.model_resolver import ModelResolver
from worker.inference.server.preloader import Preloader


def create_inference_app(
    resolver: ModelResolver, settings: ServerSettings | None = None, reservation: DeviceReservation | None = None
) -> FastAPI:
    """The application; its lifespan starts the engine and ends it. Without a reservation the device is its own."""
    service = CompletionService(resolver, settings or ServerSettings())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        keeper = ReservationKeeper(service.engine, reservation) if reservation else None
        parts = (Preloader(service.engine, resolver), keeper, service.engine)
        running = [asyncio.create_task(part.run()) for part in parts if part]
        yield
        for task in running[:-1]:  # they would resume the engine
            await _cancel(task)
        await service.engine.stop()
        await _cancel(running[-1])
        if keeper:
            await keeper.release()

    app = FastAPI(title="Veritune inference", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(RequestNormalizer)
    app.state.service = service
    _add_errors(app, service)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: CompletionService) -> None:
    guarded = [Depends(service.authorize)]

    @app.post("/v1/completions", dependencies=guarded)
    async def create_completion(request: Request) -> Response:
        return await service.complete(request)

    @app.get("/v1/models", dependencies=guarded)
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(model) for model in service.models.list_models()]})

    @app.get("/health")
    async def health() -> Response:
        if service.engine.ready:
            return Response(status_code=200)
        raise APIError(503, service.engine.unavailable_reason, retry_after=service.engine.retry_after)

    @app.get("/metrics")
    async def metrics() -> Response:
        service.metrics.engine_up.set(service.engine.ready)
        service.metrics.engine_suspended.set(service.engine.suspended)
        service.metrics.batch_invariant.set(service.engine.batch_invariant)
        service.metrics.engine_starts.set(service.engine.starts)
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI, service: CompletionService) -> None:
    @app.exception_handler(APIError)
    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        service.metrics.refused.labels(str(error.status)).inc()
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def http_exception(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error_response(APIError(error.status_code, str(error.detail)), error.headers)


def _error_response(error: APIError, headers: Mapping[str, str] | None = None) -> Response:
    retry_after = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body(), error.status, {**(headers or {}), **retry_after})


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _model_card(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.digest,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "veritune",
        "root": model.digest,
        "parent": model.base_digest if model.adapter_path else None,
        "max_model_len": model.max_model_len,
    }

"""`python -m worker.inference`: the inference server over what this deployment has published. It starts the engine."""

import uvicorn
from fastapi import FastAPI

from app.composition import compose
from app.logs import configure_logs
from app.settings import Settings, read_settings
from worker.device import host_memory
from worker.inference.ipc import EngineSettings
from worker.inference.server.app import create_inference_app
from worker.inference.server.completion_service import ServerSettings
from worker.inference.server.device_reservation import LedgerReservation
from worker.inference.server.model_resolver import PublishedResolver

HOST_MEMORY_SHARE = 4
"""Beside a GPU, adapters may take one in so many parts of the host's memory."""


def build_inference_app(settings: Settings) -> FastAPI:
    """The server of a deployment. Its engine starts when the server does."""
    services = compose(settings)
    reservation = LedgerReservation(services)
    engine = EngineSettings(
        dtype=settings.inference_dtype,
        max_batch=settings.inference_max_batch,
        memory_bytes=reservation.bytes,
        host_bytes=host_memory() // HOST_MEMORY_SHARE,
    )
    server_settings = ServerSettings(secret=settings.inference_secret, engine=engine)
    return create_inference_app(PublishedResolver(services), server_settings, reservation)


def main() -> None:
    settings = read_settings()
    configure_logs(settings.log_format)
    uvicorn.run(
        build_inference_app(settings),
        host=settings.inference_host,
        port=settings.inference_port,
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()

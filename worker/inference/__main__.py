"""`python -m worker.inference`: the front over what this deployment has published; it starts the engine itself."""

import uvicorn
from fastapi import FastAPI

from app.composition import compose
from app.logs import configure_logs
from app.settings import Settings, read_settings
from worker.device import host_memory
from worker.inference.ipc import EngineSettings
from worker.inference.server.app import ServerSettings, create_inference_app
from worker.inference.server.ledger_reservation import LedgerReservation
from worker.inference.server.model_resolver import PublishedResolver

SHARE_OF_THE_HOST = 4
"""The part of the host's memory that adapters beside a GPU may take is one in so many."""


def build_inference_app(settings: Settings) -> FastAPI:
    """The front of a deployment; its engine starts when the front does."""
    services = compose(settings)
    tenancy = LedgerReservation(services)
    engine = EngineSettings(
        dtype=settings.inference_dtype,
        max_batch=settings.inference_max_batch,
        memory_bytes=tenancy.bytes,
        host_bytes=host_memory() // SHARE_OF_THE_HOST,
    )
    told = ServerSettings(secret=settings.inference_secret, engine=engine)
    return create_inference_app(PublishedResolver(services), told, tenancy)


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

"""The API process: `create_app()` builds the FastAPI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from app.api import adapters, corpora, datasets, errors, evaluations, health, jobs, models, predict, syntheses
from app.api.guard import Guard
from app.api.schema import DocumentedApp
from app.asgi import RequestNormalizer
from app.composition import Services, compose
from app.settings import read_settings

DESCRIPTION = """
Fine-tune a base model on your fact-checking trajectories and serve the adapter.

**The way through:** upload a file with `POST /datasets`, submit a config with `POST /jobs`, poll `GET /jobs/{id}`,
upload pages to search in with `POST /corpora`, and ask `POST /predict` with a claim.

Wherever something is referenced, its id or its unique name will do. Every error is `application/problem+json`.
"""

TAGS = [
    {"name": "datasets", "description": "Trajectories to train on."},
    {"name": "jobs", "description": "Training, from submit to publish."},
    {"name": "adapters", "description": "What training published."},
    {"name": "corpora", "description": "Pages that predictions search."},
    {"name": "predictions", "description": "Claims, judged."},
    {"name": "deployment", "description": "What this deployment has, and how it does."},
]

EXTRA_THREADS = 16
"""Threads for other requests while all prediction slots are busy."""

SWAGGER = {
    "tryItOutEnabled": True,
    "displayRequestDuration": True,
    "filter": True,
    "validatorUrl": None,  # the default sends this page's URL to a third party
}


def create_app(services: Services | None = None) -> FastAPI:
    """The application over `services`, by default over the services of the environment's settings."""
    served = services or compose(read_settings())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        threads = current_default_thread_limiter()
        threads.total_tokens = max(threads.total_tokens, served.settings.prediction_slots + EXTRA_THREADS)
        await run_in_threadpool(served.sweep)
        yield
        await served.events.close()
        served.close()

    app = DocumentedApp(
        keyed=served.settings.key is not None,
        title="Veritune",
        version=version("veritune"),
        description=DESCRIPTION,
        openapi_tags=TAGS,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.state.services = served
    errors.install(app)
    # Jobs first: clients poll these routes, and routers are tried in this order.
    for module in (jobs, evaluations, syntheses, datasets, adapters, corpora, predict, models, health):
        app.include_router(module.router)
    _serve_docs(app)
    app.add_middleware(Guard, settings=served.settings)
    app.add_middleware(RequestNormalizer)  # added last, so it sees a request first
    return app


def _serve_docs(app: FastAPI) -> None:
    """Serves Swagger UI from packaged files, so that it works without internet access."""
    app.mount("/static/swagger", StaticFiles(packages=[("fastapi_swagger", "resources")]), name="swagger")

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Veritune",
            swagger_js_url="/static/swagger/swagger-ui-bundle.js",
            swagger_css_url="/static/swagger/swagger-ui.css",
            swagger_favicon_url="/static/swagger/favicon-32x32.png",
            swagger_ui_parameters=SWAGGER,
        )

    @app.get("/", include_in_schema=False)
    def home() -> RedirectResponse:
        return RedirectResponse("/docs")

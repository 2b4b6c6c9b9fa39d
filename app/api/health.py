"""/health and /metrics"""

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict

from app.api.dependencies import ServicesDep, problems
from app.domain.errors import Problem, UnavailableError

router = APIRouter(tags=["deployment"])


class Live(BaseModel):
    model_config = ConfigDict(frozen=True)

    status: Literal["live"] = "live"


class Ready(BaseModel):
    model_config = ConfigDict(frozen=True)

    status: Literal["ready"] = "ready"


@router.get("/health/live", summary="The API process answers")
def live() -> Live:
    """For a liveness probe: it says nothing of the other parts."""
    return Live()


@router.get("/health/ready", summary="API, a trainer, inference and a base model are usable", responses=problems(503))
def ready(services: ServicesDep) -> Ready:
    """503 until everything that a job and a prediction need is there; `errors` names what is not.

    Inference that makes way for a job counts as there: it comes back by itself, and all else goes on.
    """
    trainer = services.devices.trainer()
    parts = {
        "base_model": (bool(services.base_models.all()), "run: veritune models fetch"),
        "trainer": (trainer is not None and trainer.online, "start one: python -m worker"),
        "inference": (
            services.predictions.ready() or services.ledger.makes_way(),
            "start it: python -m worker.inference",
        ),
    }
    missing = tuple(Problem((part,), "is not there", hint) for part, (there, hint) in parts.items() if not there)
    if missing:
        names = ", ".join(str(part.loc[0]) for part in missing)
        raise UnavailableError(f"not ready: {names}", code="not_ready", problems=missing, retry_after=2)
    return Ready()


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "In the text format"}},
)
def metrics() -> Response:
    """Of this process, for a scraper."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

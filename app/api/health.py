"""/health and /metrics"""

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict

from app.api.dependencies import ServicesDep, problems
from app.api.routing import StrictRoute
from app.composition import Services
from app.domain.errors import Problem, UnavailableError, VerituneError

router = APIRouter(tags=["deployment"], route_class=StrictRoute)


class Live(BaseModel):
    model_config = ConfigDict(frozen=True)

    status: Literal["live"] = "live"


class Ready(BaseModel):
    model_config = ConfigDict(frozen=True)

    status: Literal["ready"] = "ready"


@router.get("/health/live", summary="The API process answers")
def get_liveness() -> Live:
    """For a liveness probe: it says nothing of the other parts."""
    return Live()


@router.get("/health/ready", summary="API, a trainer, inference and a base model are usable", responses=problems(503))
def get_readiness(services: ServicesDep) -> Ready:
    """503 until everything that a job and a prediction need is there; `errors` names what is not.

    Suspended inference counts as available: it resumes by itself, and everything else works.
    """
    trainer = services.devices.trainer()
    parts = {
        "base_model": None
        if services.base_models.list_base_models()
        else ("is not there", "run: veritune models fetch"),
        "trainer": None if trainer and trainer.online else ("is not there", "start one: python -m worker"),
        "inference": _inference(services),
    }
    missing = tuple(Problem((part,), *wrong) for part, wrong in parts.items() if wrong)
    if missing:
        names = ", ".join(str(part.loc[0]) for part in missing)
        raise UnavailableError(f"not ready: {names}", code="not_ready", problems=missing, retry_after=2)
    return Ready()


def _inference(services: Services) -> tuple[str, str] | None:
    """Why inference does not answer, as a prediction would be told, and what to do; None if it does or is suspended."""
    try:
        services.predictions.check()
    except VerituneError as error:
        if not services.ledger.inference_is_suspended():
            return error.detail, "where it does not run, start it: python -m worker.inference"
    return None


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "In the text format"}},
)
def get_metrics() -> Response:
    """Of this process, for a scraper."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

"""/health and /metrics: probes and Prometheus metrics of the API process."""

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
    """For a liveness probe. It does not check the other parts."""
    return Live()


@router.get(
    "/health/ready", summary="The service is ready: API, a trainer, inference and a base model", responses=problems(503)
)
def get_readiness(services: ServicesDep) -> Ready:
    """503 until everything that jobs and predictions need is available. `errors` names the missing parts.

    Suspended inference counts as available, because it resumes by itself.
    """
    trainer = services.devices.trainer()
    parts = {
        "base_model": None
        if services.base_models.list_base_models()
        else ("no base model is listed", "run: veritune models fetch"),
        "trainer": None if trainer and trainer.online else ("no trainer is online", "start one: python -m worker"),
        "inference": _inference(services),
    }
    missing = tuple(Problem((part,), *wrong) for part, wrong in parts.items() if wrong)
    if missing:
        names = ", ".join(str(part.loc[0]) for part in missing)
        raise UnavailableError(f"not ready: {names}", code="not_ready", problems=missing, retry_after=2)
    return Ready()


def _inference(services: Services) -> tuple[str, str] | None:
    """(the reason why inference is unavailable, what to do). None if it is available or suspended."""
    try:
        services.predictions.check()
    except VerituneError as error:
        if not services.ledger.inference_is_suspended():
            return error.detail, "if it does not run, start it: python -m worker.inference"
    return None


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "In the text format"}},
)
def get_metrics() -> Response:
    """Metrics of this API process, for a scraper."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

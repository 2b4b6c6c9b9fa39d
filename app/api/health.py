"""/health and /metrics"""

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict

from app.api.dependencies import ServicesDep, problems

router = APIRouter(tags=["deployment"])


class Live(BaseModel):
    model_config = ConfigDict(frozen=True)

    status: Literal["live"] = "live"


class Ready(BaseModel):
    """Whether a job would run and a claim be judged now; `missing` names what is not there."""

    model_config = ConfigDict(frozen=True)

    status: Literal["ready", "not_ready"]
    missing: list[str]


@router.get("/health/live", summary="The API process answers")
def live() -> Live:
    return Live()


@router.get("/health/ready", summary="API, a trainer, inference and a base model are usable", responses=problems(503))
def ready(services: ServicesDep, response: Response) -> Ready:
    """503 until everything that a job and a prediction need is there."""
    trainer = services.devices.trainer()
    parts = {
        "base model": bool(services.base_models.all()),
        "trainer": trainer is not None and trainer.online,
        "inference": services.predictions.ready(),
    }
    missing = [part for part, there in parts.items() if not there]
    response.status_code = 503 if missing else 200
    return Ready(status="not_ready" if missing else "ready", missing=missing)


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

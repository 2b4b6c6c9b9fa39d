"""/jobs"""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import WithJsonSchema

from app.api.dependencies import After, IdempotencyKey, Limit, Page, RawBody, ServicesDep, problems
from app.composition import Services
from app.domain.jobs import Checkpoint, Event, Job, JobStatus, Metric, Wish
from app.domain.plans import Plan
from app.domain.specs import spec_examples

router = APIRouter(prefix="/jobs", tags=["jobs"])

Spec = Annotated[
    dict[str, Any],
    Body(openapi_examples={name: {"value": value} for name, value in spec_examples().items()}),
    WithJsonSchema({"$ref": "#/components/schemas/TrainSpec"}),
]
Seq = Annotated[int, Query(ge=0, le=2**31, description="Number of the last one seen.")]
Many = Annotated[int, Query(ge=1, le=1_000)]


@router.post("/plan", summary="What a job would take", responses=problems(404, 415))
def plan(services: ServicesDep, spec: Spec) -> Plan:
    """Rows, tokens, over-length rows and what the policy does to each, updates. Nothing is queued."""
    return services.jobs.plan(spec)


@router.post("", status_code=201, summary="Submit a job", response_model=Job, responses=problems(404, 409, 415))
def submit(services: ServicesDep, spec: Spec, body: RawBody, key: IdempotencyKey = None) -> Response:
    """Queue a training job from a declarative config; only `dataset` is required.

    Unknown keys are refused with a did-you-mean; what this version does not run yet is refused with
    `code: not_yet_supported`.
    """

    def work() -> tuple[int, dict[str, Any]]:
        return 201, services.jobs.submit(spec).model_dump(mode="json")

    status, answer = services.idempotency.once("POST /jobs", key, body, work)
    return JSONResponse(answer, status, {"Location": f"/jobs/{answer['id']}"})


@router.get("", summary="List jobs")
def listing(
    services: ServicesDep, after: After = None, limit: Limit = 20, status: JobStatus | None = None
) -> Page[Job]:
    """Newest first."""
    data, more = services.jobs.page(after, limit, status)
    return Page(data=data, has_more=more)


@router.get("/{job}", summary="A job, its progress and its end", responses=problems(404))
def read(services: ServicesDep, job: str) -> Job:
    return services.jobs.get(job)


@router.post("/{job}/cancel", summary="Cancel a job", responses=problems(404, 409))
def cancel(services: ServicesDep, job: str) -> Job:
    """At once when it waits; within seconds when it runs. A finished job cannot be cancelled (409)."""
    return services.jobs.wish(job, Wish.CANCEL)


@router.post("/{job}/pause", summary="Pause a job behind a checkpoint", responses=problems(404, 409))
def pause(services: ServicesDep, job: str) -> Job:
    return services.jobs.wish(job, Wish.PAUSE)


@router.post("/{job}/resume", summary="Resume a paused job", responses=problems(404, 409))
def resume(services: ServicesDep, job: str) -> Job:
    """It goes on from its newest checkpoint."""
    return services.jobs.wish(job, Wish.RESUME)


@router.get(
    "/{job}/events",
    summary="A job's events: a page, or a stream",
    response_model=Page[Event],
    responses={200: {"content": {"text/event-stream": {}}}, **problems(404)},
)
async def events(
    request: Request,
    services: ServicesDep,
    job: str,
    after: Seq = 0,
    limit: Many = 100,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> Response:
    """With `Accept: text/event-stream` the events come as they happen, from behind `Last-Event-ID` on."""
    if "text/event-stream" not in request.headers.get("accept", ""):
        found, more = await run_in_threadpool(services.jobs.events, job, after, limit)
        page = Page[Event](data=found, has_more=more)
        return JSONResponse(page.model_dump(mode="json"))
    await run_in_threadpool(services.jobs.get, job)
    start = int(last_event_id) if last_event_id and last_event_id.isdigit() else after
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(services, job, start), media_type="text/event-stream", headers=headers)


async def _stream(services: Services, job: str, after: int) -> AsyncIterator[str]:
    async for event in services.events.follow(job, after):
        yield f"id: {event.seq}\nevent: {event.kind}\ndata: {json.dumps(event.model_dump(mode='json'))}\n\n"


@router.get("/{job}/metrics", summary="A job's metrics, one row an update", responses=problems(404))
def metrics(services: ServicesDep, job: str, after: Seq = 0, limit: Many = 1_000) -> Page[Metric]:
    data, more = services.jobs.metrics(job, after, limit)
    return Page(data=data, has_more=more)


@router.get("/{job}/checkpoints", summary="A job's resumable states", responses=problems(404))
def checkpoints(services: ServicesDep, job: str) -> Page[Checkpoint]:
    return Page(data=services.jobs.checkpoints(job), has_more=False)

"""/jobs"""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import WithJsonSchema

from app.api.dependencies import (
    AFTER,
    IdempotencyKey,
    IdOf,
    Limit,
    Page,
    RawBody,
    Seq,
    ServicesDep,
    event_stream,
    named,
    problems,
)
from app.api.routing import StrictRoute
from app.composition import Services
from app.domain.adapters import Adapter, PublishRequest
from app.domain.devices import CARDS
from app.domain.jobs import TERMINAL, Artifact, Checkpoint, Event, Job, JobAction, JobStatus, Metric
from app.domain.plans import Plan, plan_example
from app.domain.specs import spec_examples

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=StrictRoute)

Spec = Annotated[
    dict[str, Any],
    Body(openapi_examples={name: {"value": value} for name, value in spec_examples().items()}),
    WithJsonSchema({"$ref": "#/components/schemas/TrainSpec"}),
]
JobReference = Annotated[str, named("job")]
After = Annotated[Annotated[str, IdOf("job", "a job")] | None, AFTER]
WaitingJobReference = Annotated[str, named("job", example="demo-later")]
Many = Annotated[int, Query(ge=1, le=1_000, description="Items on a page.")]
LastEventId = Annotated[
    int | None,
    Header(alias="Last-Event-ID", ge=0, le=2**31 - 1, description="In a stream, goes before `after`."),
]
Update = Annotated[
    int,
    Path(
        ge=1,
        le=2**31 - 1,
        description="The update whose checkpoint it is.",
        openapi_examples={"the last": {"value": "30", "summary": "the last update of the job that `make demo` leaves"}},
    ),
]
Publish = Annotated[
    PublishRequest,
    Body(openapi_examples={"named": {"value": {"name": "demo-checkpoint"}}, "by job and update": {"value": {}}}),
]
ArtifactName = Annotated[
    str,
    Path(
        min_length=1,
        max_length=200,
        description="The file's name.",
        openapi_examples={"rows.jsonl": {"value": "rows.jsonl", "summary": "each row's loss"}},
    ),
]
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
On = Annotated[
    str | None,
    Query(
        min_length=1,
        max_length=200,
        description=f"Name of a device of `GET /devices`, or a card: {', '.join(CARDS)}. Else the trainer's device.",
        openapi_examples={name: {"value": name, "summary": card.model} for name, card in CARDS.items()},
    ),
]
Rows = Annotated[
    Literal["first", "all"],
    Query(
        description="Over-length rows that are listed: the first 100, or all, of which 10,000 are noted.",
        openapi_examples={"all": {"value": "all"}, "first": {"value": "first"}},
    ),
]
_EVENTS = event_stream(
    {"$ref": "#/components/schemas/Event"},
    {"description": "The event's kind"},
    id={"type": "string", "description": "The event's seq, to come back with as Last-Event-ID"},
)
KEEP_ALIVE = ": still here\n\n"


@router.post(
    "/plan",
    summary="What a job would take",
    responses={200: {"content": {"application/json": {"example": plan_example()}}}, **problems(404)},
)
def plan_job(services: ServicesDep, spec: Spec, device: On = None, rows: Rows = "first") -> Plan:
    """Rows, tokens, what the policy does to over-length rows, updates, memory by part, time. Nothing is queued.

    `fits` says whether the memory suffices; where it does not, `remedies` are changes of the config with which it does.
    """
    return services.jobs.plan(spec, device, every_row=rows == "all")


@router.post("", status_code=201, summary="Submit a job", response_model=Job, responses=problems(404, 409))
def submit_job(services: ServicesDep, spec: Spec, body: RawBody, key: IdempotencyKey = None) -> Response:
    """Queue a training job from a declarative config; only `dataset` is required.

    Unknown keys are refused with a did-you-mean; what this version does not run yet is refused with
    `code: not_yet_supported`; what the trainer's memory does not hold with `code: does_not_fit` and changes that help.
    """

    def work() -> tuple[int, dict[str, Any]]:
        return 201, services.jobs.submit(spec).model_dump(mode="json")

    status, answer = services.idempotency.run_once("POST /jobs", key, body, work)
    return JSONResponse(answer, status, {"Location": f"/jobs/{answer['id']}"})


@router.get("", summary="List jobs")
def list_jobs(
    services: ServicesDep,
    after: After = None,
    limit: Limit = 20,
    status: Annotated[JobStatus | None, Query(description="Only jobs of this status.")] = None,
) -> Page[Job]:
    """Newest first."""
    data, more = services.jobs.list_jobs(after, limit, status)
    return Page(data=data, has_more=more)


@router.get("/{job}", summary="A job, its progress and its end", responses=problems(404))
async def get_job(services: ServicesDep, job: JobReference) -> Job:
    """Poll this. `queue_position` is set while it waits, `progress` while it runs, `error` when it failed."""
    return await services.job_snapshots.get(job)


@router.delete("/{job}", status_code=204, summary="Delete a job that has ended", responses=problems(404, 409))
def delete_job(services: ServicesDep, job: JobReference) -> None:
    """Delete it with its events, metrics, checkpoints and artifacts; its name is free again. Its adapter stays."""
    services.jobs.delete(job)


@router.post("/{job}/pause", summary="Pause a job after a checkpoint", responses=problems(404, 409))
def pause_job(services: ServicesDep, job: WaitingJobReference) -> Job:
    """At once when it waits; when it runs, it writes a checkpoint first and leaves the device."""
    return services.jobs.request_action(job, JobAction.PAUSE)


@router.post("/{job}/resume", summary="Resume a paused job", responses=problems(404, 409))
def resume_job(services: ServicesDep, job: WaitingJobReference) -> Job:
    """It goes on from its newest checkpoint."""
    return services.jobs.request_action(job, JobAction.RESUME)


@router.post("/{job}/cancel", summary="Cancel a job", responses=problems(404, 409))
def cancel_job(services: ServicesDep, job: WaitingJobReference) -> Job:
    """At once when it waits; within seconds when it runs. A finished job cannot be cancelled (409)."""
    return services.jobs.request_action(job, JobAction.CANCEL)


@router.get(
    "/{job}/events",
    summary="A job's events: a page, or a stream",
    response_model=Page[Event],
    responses={
        200: {"content": _EVENTS, "description": "Events, oldest first"},
        204: {"description": "Stream only: the job has ended and every event was sent before; do not reconnect"},
        **problems(404),
    },
)
async def list_job_events(
    request: Request,
    services: ServicesDep,
    job: JobReference,
    after: Seq = 0,
    limit: Many = 100,
    last_event_id: LastEventId = None,
) -> Response:
    """With `Accept: text/event-stream` the events come as they happen, from the one after `Last-Event-ID` on."""
    if "text/event-stream" not in request.headers.get("accept", ""):
        found, more = await run_in_threadpool(services.jobs.events, job, after, limit)
        page = Page[Event](data=found, has_more=more)
        return JSONResponse(page.model_dump(mode="json"))
    start = after if last_event_id is None else last_event_id
    if await run_in_threadpool(_nothing_follows, services, job, start):
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(services, job, start), media_type="text/event-stream", headers=headers)


def _nothing_follows(services: Services, job: str, after: int) -> bool:
    """Whether the job has ended and has no event after number `after`."""
    return services.jobs.get(job).status in TERMINAL and not services.jobs.events(job, after, 1)[0]


async def _stream(services: Services, job: str, after: int) -> AsyncIterator[str]:
    async for event in services.events.follow(job, after):
        if event is None:
            yield KEEP_ALIVE
        else:
            yield f"id: {event.seq}\nevent: {event.kind}\ndata: {json.dumps(event.model_dump(mode='json'))}\n\n"


@router.get("/{job}/metrics", summary="A job's metrics, one row an update", responses=problems(404))
def list_job_metrics(services: ServicesDep, job: JobReference, after: Seq = 0, limit: Many = 1_000) -> Page[Metric]:
    """Loss, learning rate, gradient norm, tokens and pace, oldest first. Skipped updates say so."""
    data, more = services.jobs.metrics(job, after, limit)
    return Page(data=data, has_more=more)


@router.get("/{job}/checkpoints", summary="A job's resumable states", responses=problems(404))
def list_checkpoints(services: ServicesDep, job: JobReference) -> Page[Checkpoint]:
    """Newest first. A paused or interrupted job goes on from the first of them; `best` has the lowest validation loss.

    The last two and the best are kept, and go some time after the job has ended.
    """
    return Page(data=services.jobs.checkpoints(job), has_more=False)


@router.post(
    "/{job}/checkpoints/{update}/publish",
    status_code=201,
    summary="Publish a checkpoint as an adapter",
    response_model=Adapter,
    responses=problems(404, 409),
)
def publish_checkpoint(
    services: ServicesDep, job: JobReference, update: Update, asked: Publish, body: RawBody, key: IdempotencyKey = None
) -> Response:
    """The weights of that update become an adapter of their own, while the job runs or after it."""

    def work() -> tuple[int, dict[str, Any]]:
        return 201, services.checkpoints.publish(job, update, asked.name).model_dump(mode="json")

    same = f"{job}\n{update}\n".encode() + body
    status, answer = services.idempotency.run_once("POST /jobs/checkpoints/publish", key, same, work)
    return JSONResponse(answer, status, {"Location": f"/adapters/{answer['id']}"})


@router.get("/{job}/artifacts", summary="Files that a job left", responses=problems(404))
def list_artifacts(services: ServicesDep, job: JobReference) -> Page[Artifact]:
    """By name: `rows.jsonl`, the loss that was last seen of each row; `events.out.tfevents`, for TensorBoard.

    They come when an attempt ends, well or not, and are replaced when the next one does.
    """
    return Page(data=services.artifacts.list_artifacts(job), has_more=False)


@router.get(
    "/{job}/artifacts/{name}",
    summary="Download a file that a job left",
    response_class=StreamingResponse,
    responses={200: {"content": _BYTES, "description": "The file"}, **problems(404)},
)
def download_artifact(services: ServicesDep, job: JobReference, name: ArtifactName) -> StreamingResponse:
    """`rows.jsonl`: JSON lines of {line, part, tokens, labelled_tokens, loss, update}, for each row that was kept."""
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(
        services.artifacts.stream(job, name), media_type="application/octet-stream", headers=headers
    )

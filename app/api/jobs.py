"""/jobs: plan, submit, follow and steer jobs; their events, metrics, checkpoints and artifacts."""

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
LongLimit = Annotated[int, Query(ge=1, le=1_000, description="Maximum number of items on a page.")]
LastEventId = Annotated[
    int | None,
    Header(alias="Last-Event-ID", ge=0, le=2**31 - 1, description="In a stream, it replaces `after`."),
]
Update = Annotated[
    int,
    Path(
        ge=1,
        le=2**31 - 1,
        description="The update that the checkpoint was written after.",
        openapi_examples={
            "the last": {"value": "30", "summary": "the last update of the job that `make demo` creates"}
        },
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
PlanDevice = Annotated[
    str | None,
    Query(
        min_length=1,
        max_length=200,
        description=f"Name of a device of `GET /devices`, or a card: {', '.join(CARDS)}. Default: the trainer's.",
        openapi_examples={name: {"value": name, "summary": card.model} for name, card in CARDS.items()},
    ),
]
OverlengthRows = Annotated[
    Literal["first", "all"],
    Query(
        description="Which over-length rows are listed: the first 100, or all (at most 10,000).",
        openapi_examples={"all": {"value": "all"}, "first": {"value": "first"}},
    ),
]
_EVENTS = event_stream(
    {"$ref": "#/components/schemas/Event"},
    {"description": "The event's kind"},
    id={"type": "string", "description": "The event's seq; send it as Last-Event-ID to continue after it"},
)
KEEP_ALIVE = ": still here\n\n"


@router.post(
    "/plan",
    summary="What a job would take",
    responses={200: {"content": {"application/json": {"example": plan_example()}}}, **problems(404)},
)
def plan_job(services: ServicesDep, spec: Spec, device: PlanDevice = None, rows: OverlengthRows = "first") -> Plan:
    """Estimate rows, tokens, truncation, updates, memory by part, and time. Nothing is queued.

    `fits` says whether the device has enough memory. If it has not, `remedies` lists changes with which the job fits.
    """
    return services.jobs.plan(spec, device, every_row=rows == "all")


@router.post("", status_code=201, summary="Submit a job", response_model=Job, responses=problems(404, 409))
def submit_job(services: ServicesDep, spec: Spec, body: RawBody, key: IdempotencyKey = None) -> Response:
    """Queue a training job from a declarative config. Only `dataset` is required.

    An unknown key is refused with a suggestion. A feature that this version lacks is refused with
    `code: not_yet_supported`. A job that does not fit the trainer's memory is refused with `code: does_not_fit`, and
    with changes that help.
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
    """Poll it. `queue_position` is set while the job waits, `progress` while it runs, `error` when it has failed."""
    return await services.job_snapshots.get(job)


@router.delete("/{job}", status_code=204, summary="Delete a job that has ended", responses=problems(404, 409))
def delete_job(services: ServicesDep, job: JobReference) -> None:
    """Delete it with its events, metrics, checkpoints and artifacts; its name is free again. Its adapter stays."""
    services.jobs.delete(job)


@router.post("/{job}/pause", summary="Pause a job after a checkpoint", responses=problems(404, 409))
def pause_job(services: ServicesDep, job: WaitingJobReference) -> Job:
    """A waiting job pauses at once. A running job writes a checkpoint first, and then frees the device."""
    return services.jobs.request_action(job, JobAction.PAUSE)


@router.post("/{job}/resume", summary="Resume a paused job", responses=problems(404, 409))
def resume_job(services: ServicesDep, job: WaitingJobReference) -> Job:
    """Continue it from its newest checkpoint."""
    return services.jobs.request_action(job, JobAction.RESUME)


@router.post("/{job}/cancel", summary="Cancel a job", responses=problems(404, 409))
def cancel_job(services: ServicesDep, job: WaitingJobReference) -> Job:
    """A waiting job ends at once, a running job within seconds. A finished job cannot be cancelled (409)."""
    return services.jobs.request_action(job, JobAction.CANCEL)


@router.get(
    "/{job}/events",
    summary="A job's events: a page, or a stream",
    response_model=Page[Event],
    responses={
        200: {"content": _EVENTS, "description": "Events, oldest first"},
        204: {"description": "Stream only: the job has ended and all its events were sent; do not reconnect"},
        **problems(404),
    },
)
async def list_job_events(
    request: Request,
    services: ServicesDep,
    job: JobReference,
    after: Seq = 0,
    limit: LongLimit = 100,
    last_event_id: LastEventId = None,
) -> Response:
    """With `Accept: text/event-stream`, stream the events after `Last-Event-ID` as they happen."""
    if "text/event-stream" not in request.headers.get("accept", ""):
        found, more = await run_in_threadpool(services.jobs.events, job, after, limit)
        page = Page[Event](data=found, has_more=more)
        return JSONResponse(page.model_dump(mode="json"))
    start = after if last_event_id is None else last_event_id
    if await run_in_threadpool(_has_no_more_events, services, job, start):
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(services, job, start), media_type="text/event-stream", headers=headers)


def _has_no_more_events(services: Services, job: str, after: int) -> bool:
    """Whether the job has ended and has no event after number `after`."""
    return services.jobs.get(job).status in TERMINAL and not services.jobs.events(job, after, 1)[0]


async def _stream(services: Services, job: str, after: int) -> AsyncIterator[str]:
    async for event in services.events.follow(job, after):
        if event is None:
            yield KEEP_ALIVE
        else:
            yield f"id: {event.seq}\nevent: {event.kind}\ndata: {json.dumps(event.model_dump(mode='json'))}\n\n"


@router.get("/{job}/metrics", summary="A job's metrics, one row an update", responses=problems(404))
def list_job_metrics(
    services: ServicesDep, job: JobReference, after: Seq = 0, limit: LongLimit = 1_000
) -> Page[Metric]:
    """Loss, learning rate, gradient norm, tokens and tokens per second, oldest first. Skipped updates are marked."""
    data, more = services.jobs.metrics(job, after, limit)
    return Page(data=data, has_more=more)


@router.get("/{job}/checkpoints", summary="A job's resumable states", responses=problems(404))
def list_checkpoints(services: ServicesDep, job: JobReference) -> Page[Checkpoint]:
    """Newest first. A paused or interrupted job resumes from the newest. `best` has the lowest validation loss.

    The last two and the best are kept. They are deleted some time after the job has ended.
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
    """Publish that update's weights as an adapter of its own, while the job runs or after it has ended."""

    def work() -> tuple[int, dict[str, Any]]:
        return 201, services.checkpoints.publish(job, update, asked.name).model_dump(mode="json")

    same = f"{job}\n{update}\n".encode() + body
    status, answer = services.idempotency.run_once("POST /jobs/checkpoints/publish", key, same, work)
    return JSONResponse(answer, status, {"Location": f"/adapters/{answer['id']}"})


@router.get("/{job}/artifacts", summary="Files that a job left", responses=problems(404))
def list_artifacts(services: ServicesDep, job: JobReference) -> Page[Artifact]:
    """Sorted by name: `events.out.tfevents` for TensorBoard; `rows.jsonl` with the latest loss of each row.

    They are written when an attempt ends, whether it succeeded or not, and replaced when the next attempt ends.
    """
    return Page(data=services.artifacts.list_artifacts(job), has_more=False)


@router.get(
    "/{job}/artifacts/{name}",
    summary="Download a file that a job left",
    response_class=StreamingResponse,
    responses={200: {"content": _BYTES, "description": "The file"}, **problems(404)},
)
def download_artifact(services: ServicesDep, job: JobReference, name: ArtifactName) -> StreamingResponse:
    """Each line of `rows.jsonl` is {line, part, tokens, labelled_tokens, loss, update} of one kept row."""
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(
        services.artifacts.stream(job, name), media_type="application/octet-stream", headers=headers
    )

"""/datasets: the jobs that make a dataset from another one. They are followed and steered under /jobs."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from fastapi.responses import JSONResponse

from app.api.dependencies import IdempotencyKey, RawBody, ServicesDep, named, problems
from app.api.routing import StrictRoute
from app.domain.jobs import Job
from app.domain.synthesis import RegroundOptions, RegroundSpec, SynthesisSpec, synthesis_examples
from app.services.syntheses import AnySynthesis

router = APIRouter(prefix="/datasets", tags=["datasets"], route_class=StrictRoute)

_EXAMPLES = {name: {"value": value} for name, value in synthesis_examples().items()}
_ANSWERS: dict[str, Any] = {"status_code": 201, "response_model": Job, "responses": problems(404, 409)}


@router.post("/synthesize", summary="Make trajectories from labelled claims", **_ANSWERS)
def synthesize_dataset(
    services: ServicesDep,
    spec: Annotated[SynthesisSpec, Body(openapi_examples=_EXAMPLES)],
    body: RawBody,
    key: IdempotencyKey = None,
) -> Response:
    """Make a dataset to train on from claims, their labels and the pages that they are about.

    Upload the claims with `kind=claims`. For each, the job runs Search and Lookup on the corpus until the evidence is
    shown, and writes the steps down; no model takes part. Each Observation is what the corpus answers to its Action.
    The answer is a job of kind `synthesize`. Its progress names the new dataset, its artifact `report.json` the rows
    that were left out, and why.
    """
    return _submit(services, spec, "POST /datasets/synthesize", key, body)


@router.post("/{dataset}/reground", summary="Replace a dataset's Observations", **_ANSWERS)
def reground_dataset(
    services: ServicesDep,
    dataset: Annotated[str, named("dataset")],
    options: Annotated[RegroundOptions, Body(openapi_examples={"the least": {"value": {}}})],
    body: RawBody,
    key: IdempotencyKey = None,
) -> Response:
    """Replay every Action of a dataset on a corpus, and replace its Observations by what that answers.

    Use it for trajectories from elsewhere: an adapter should train on the pages that it will read. Rows whose Searches
    open nothing, or whose Thoughts quote what is observed no more, are left out. The answer is a job of kind
    `reground`.
    """
    spec = RegroundSpec(dataset=services.datasets.get(dataset).id, **options.model_dump())
    return _submit(services, spec, "POST /datasets/reground", key, f"{dataset}\n".encode() + body)


def _submit(services: ServicesDep, spec: AnySynthesis, route: str, key: str | None, body: bytes) -> Response:
    def work() -> tuple[int, dict[str, Any]]:
        return 201, services.jobs.get(services.syntheses.submit(spec)).model_dump(mode="json")

    status, answer = services.idempotency.run_once(route, key, body, work)
    return JSONResponse(answer, status, {"Location": f"/jobs/{answer['id']}"})

"""/evaluations: submit an evaluation job. It is followed and steered like every job, under /jobs."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from fastapi.responses import JSONResponse

from app.api.dependencies import IdempotencyKey, RawBody, ServicesDep, problems
from app.api.routing import StrictRoute
from app.domain.evaluations import EvaluationSpec, evaluation_examples
from app.domain.jobs import Job

router = APIRouter(prefix="/evaluations", tags=["jobs"], route_class=StrictRoute)

_EXAMPLES = {name: {"value": value} for name, value in evaluation_examples().items()}


@router.post("", status_code=201, summary="Submit an evaluation", response_model=Job, responses=problems(404, 409))
def submit_evaluation(
    services: ServicesDep,
    spec: Annotated[EvaluationSpec, Body(openapi_examples=_EXAMPLES)],
    body: RawBody,
    key: IdempotencyKey = None,
) -> Response:
    """Judge a dataset's claims with base and adapters, and report how well.

    The report has accuracy with its interval, recall, evidence, calibration, controls and paired tests.
    The answer is a job of kind `evaluate`. Poll it under `/jobs`; its artifacts are `report.html`, `report.json` and
    `answers.jsonl`.
    """

    def work() -> tuple[int, dict[str, Any]]:
        return 201, services.jobs.get(services.evaluations.submit(spec)).model_dump(mode="json")

    status, answer = services.idempotency.run_once("POST /evaluations", key, body, work)
    return JSONResponse(answer, status, {"Location": f"/jobs/{answer['id']}"})

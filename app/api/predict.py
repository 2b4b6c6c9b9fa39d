"""/predict: the ReAct loop, whole or streamed."""

from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from app.api.dependencies import IdempotencyKey, RawBody, ServicesDep, problems
from app.api.errors import ProblemDocument, document_of
from app.domain.errors import InvalidError, VerituneError
from app.domain.predictions import Prediction, PredictionEvent, PredictRequest

router = APIRouter(tags=["predictions"])

MOST_CLAIMS = 1_000

_ASK = {
    "the promoted adapter": {"value": {"claim": "The Danube flows into the Black Sea."}},
    "the base model": {"value": {"claim": "The Danube flows into the Black Sea.", "adapter": None}},
    "step by step": {"value": {"claim": "The Danube flows into the Black Sea.", "stream": True}},
}


class BatchRequest(BaseModel):
    """Many claims, asked alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: Annotated[list[PredictRequest], Field(min_length=1, max_length=MOST_CLAIMS)]


class BatchAnswer(BaseModel):
    """In the order asked: a prediction, or the problem that kept it from being made."""

    model_config = ConfigDict(frozen=True)

    data: list[Prediction | ProblemDocument]


@router.post(
    "/predict",
    summary="Judge a claim",
    response_model=Prediction,
    responses={200: {"content": {"text/event-stream": {}}}, **problems(404, 409, 415, 429, 503)},
)
def predict(
    services: ServicesDep,
    ask: Annotated[PredictRequest, Body(openapi_examples=_ASK)],
    body: RawBody,
    key: IdempotencyKey = None,
) -> Response:
    """Verdict, its probability, the steps taken and the sentences read.

    The model writes Thoughts and chooses Actions; Observations come from the corpus, never from the model. With
    `stream: true` the steps come as server-sent events, the prediction last.
    """
    if ask.stream:
        told = services.predictions.events(ask)
        first = next(told)  # raises here, before any header is sent, when the request cannot be served
        return StreamingResponse(_stream(chain([first], told)), media_type="text/event-stream")

    def work() -> tuple[int, dict[str, Any]]:
        return 200, services.predictions.predict(ask).model_dump(mode="json")

    status, answer = services.idempotency.once("POST /predict", key, body, work)
    return JSONResponse(answer, status)


def _stream(told: Iterator[PredictionEvent]) -> Iterator[str]:
    try:
        for event in told:
            yield f"event: {event.event}\ndata: {event.model_dump_json()}\n\n"
    except VerituneError as error:
        document = ProblemDocument.model_validate(document_of(error, "/predict"))
        yield f"event: error\ndata: {document.model_dump_json()}\n\n"


@router.post("/predict/batch", summary="Judge many claims", responses=problems(404, 409, 415, 429, 503))
def batch(services: ServicesDep, ask: BatchRequest) -> BatchAnswer:
    """Several run at a time. One that cannot be judged leaves a problem in its place."""
    if any(request.stream for request in ask.requests):
        raise InvalidError("a batch is not streamed; leave stream out", code="batch_not_streamed")
    answers = services.predictions.batch(ask.requests)
    return BatchAnswer(
        data=[
            answer
            if isinstance(answer, Prediction)
            else ProblemDocument.model_validate(document_of(answer, "/predict/batch"))
            for answer in answers
        ]
    )


@router.get("/predictions/{prediction}", summary="A stored prediction", responses=problems(404))
def read(services: ServicesDep, prediction: str) -> Prediction:
    """Stored when asked with `store: true`."""
    return services.predictions.get(prediction)

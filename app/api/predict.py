"""/predict: run the ReAct loop, whole or streamed. /predictions: list, read and delete stored predictions."""

import json
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from app.api.dependencies import (
    AFTER,
    CancelledByDisconnect,
    IdempotencyKey,
    IdOf,
    Limit,
    Page,
    RawBody,
    ServicesDep,
    event_stream,
    named,
    problems,
)
from app.api.errors import ProblemDocument, document_of, unexpected
from app.api.routing import StrictRoute
from app.domain.errors import InvalidError, Problem, VerituneError
from app.domain.frozen import Frozen
from app.domain.predictions import Prediction, PredictionEvent, PredictRequest
from app.services.prompt_session import never_cancelled

router = APIRouter(tags=["predictions"], route_class=StrictRoute)

After = Annotated[Annotated[str, IdOf("pred", "a stored prediction")] | None, AFTER]

MOST_CLAIMS = 1_000
TRANSIENT_STATUSES = (429, 503)

_ASK = {
    "the promoted adapter": {"value": {"claim": "The Danube flows into the Black Sea."}},
    "the base model": {"value": {"claim": "The Danube flows into the Black Sea.", "adapter": None}},
    "step by step": {"value": {"claim": "The Danube flows into the Black Sea.", "stream": True}},
}
_ASK_MANY = {
    "two claims": {
        "value": {
            "requests": [
                {"claim": "The Danube flows into the Black Sea."},
                {"claim": "The Danube flows into the North Sea.", "adapter": None},
            ]
        }
    }
}
_EVENT_DATA = {
    "description": "{event, step, thought}, {event, step, action}, {event, step, observation}; the last one is "
    "{event, prediction}, or, if that failed, a ProblemDocument",
    "type": "object",
}
_STREAM = event_stream(_EVENT_DATA, {"enum": ["thought", "action", "observation", "prediction", "error"]})


class BatchRequest(Frozen):
    """Up to 1,000 requests."""

    requests: Annotated[list[PredictRequest], Field(min_length=1, max_length=MOST_CLAIMS)]


class BatchAnswer(BaseModel):
    """One entry for each request, in order: its prediction, or the problem that prevented it."""

    model_config = ConfigDict(frozen=True)

    data: list[Prediction | ProblemDocument]


@router.post(
    "/predict",
    summary="Judge a claim",
    response_model=Prediction,
    responses={200: {"content": _STREAM, "description": "The prediction"}, **problems(404, 409, 429, 503)},
)
def predict(
    services: ServicesDep,
    ask: Annotated[PredictRequest, Body(openapi_examples=_ASK)],
    body: RawBody,
    is_cancelled: CancelledByDisconnect,
    key: IdempotencyKey = None,
) -> Response:
    """Return the verdict, its probability, the steps, and the sentences that were read as evidence.

    The model writes Thoughts and chooses Actions. Observations come from the corpus, never from the model. With
    `stream: true`, each step is a server-sent event, and the prediction is the last one.
    """
    if ask.stream:
        events = services.predictions.stream(ask, is_cancelled)
        first = next(events)  # an error here is raised before the headers are sent
        return StreamingResponse(_stream(chain([first], events)), media_type="text/event-stream")

    def work() -> tuple[int, dict[str, Any]]:
        return 200, services.predictions.predict(ask, is_cancelled if key is None else never_cancelled).model_dump(
            mode="json"
        )

    status, answer = services.idempotency.run_once("POST /predict", key, body, work)
    return JSONResponse(answer, status)


def _stream(events: Iterator[PredictionEvent]) -> Iterator[str]:
    try:
        for event in events:
            yield f"event: {event.event}\ndata: {event.model_dump_json()}\n\n"
    except VerituneError as error:
        yield _error_event(document_of(error, "/predict"))
    except Exception as error:  # the status 200 is sent already, so an event reports it
        yield _error_event(unexpected(error, "/predict"))


def _error_event(document: dict[str, Any]) -> str:
    return f"event: error\ndata: {json.dumps(document)}\n\n"


@router.post(
    "/predict/batch", summary="Judge many claims", response_model=BatchAnswer, responses=problems(404, 409, 429, 503)
)
def predict_batch(
    services: ServicesDep,
    ask: Annotated[BatchRequest, Body(openapi_examples=_ASK_MANY)],
    body: RawBody,
    is_cancelled: CancelledByDisconnect,
    key: IdempotencyKey = None,
) -> Response:
    """Judge several claims at a time. A claim that cannot be judged has a problem as its entry."""
    if any(request.stream for request in ask.requests):
        raise InvalidError("a batch cannot be streamed; leave out stream", code="batch_not_streamed")
    _refuse_repeated_names([request.name for request in ask.requests])

    def work() -> tuple[int, dict[str, Any]]:
        answers = services.predictions.predict_batch(ask.requests, is_cancelled if key is None else never_cancelled)
        return 200, BatchAnswer(data=[_batch_entry(answer) for answer in answers]).model_dump(mode="json")

    status, answer = services.idempotency.run_once("POST /predict/batch", key, body, work, _is_final)
    return JSONResponse(answer, status)


def _refuse_repeated_names(names: list[str | None]) -> None:
    repeated = [index for index, name in enumerate(names) if name is not None and name in names[:index]]
    if repeated:
        found = tuple(Problem(("requests", index, "name"), "an earlier claim has this name") for index in repeated)
        raise InvalidError("the names of a batch's claims must differ", code="name_repeated", problems=found)


def _is_final(answer: dict[str, Any]) -> bool:
    """Whether a retry would change nothing: no claim of the batch failed for a transient reason."""
    return not any(entry.get("status") in TRANSIENT_STATUSES for entry in answer["data"])


def _batch_entry(answer: Prediction | VerituneError) -> Prediction | ProblemDocument:
    if isinstance(answer, Prediction):
        return answer
    return ProblemDocument.model_validate(document_of(answer, "/predict/batch"))


@router.get("/predictions", summary="List stored predictions")
def list_predictions(services: ServicesDep, after: After = None, limit: Limit = 20) -> Page[Prediction]:
    """Newest first."""
    data, more = services.stored_predictions.list_predictions(after, limit)
    return Page(data=data, has_more=more)


@router.get("/predictions/{prediction}", summary="A stored prediction", responses=problems(404))
def get_prediction(services: ServicesDep, prediction: Annotated[str, named("prediction")]) -> Prediction:
    """A request with `store: true` stores its prediction. Its `name`, if it has one, can be used here."""
    return services.stored_predictions.get(prediction)


@router.delete(
    "/predictions/{prediction}", status_code=204, summary="Delete a stored prediction", responses=problems(404)
)
def delete_prediction(services: ServicesDep, prediction: Annotated[str, named("prediction")]) -> None:
    """Delete it. Its name is free again."""
    services.stored_predictions.delete(prediction)

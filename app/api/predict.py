"""/predict: the ReAct loop, whole or streamed; /predictions: what was kept of it."""

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
PASSING = (429, 503)

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
    "description": "{event, step, thought}, {event, step, action}, {event, step, observation}, {event, prediction} "
    "last; or in its place an error, which is a ProblemDocument",
    "type": "object",
}
_STREAM = event_stream(_EVENT_DATA, {"enum": ["thought", "action", "observation", "prediction", "error"]})


class BatchRequest(Frozen):
    """Many claims, asked alike."""

    requests: Annotated[list[PredictRequest], Field(min_length=1, max_length=MOST_CLAIMS)]


class BatchAnswer(BaseModel):
    """In the order asked: a prediction, or the problem that kept it from being made."""

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
    """Verdict, its probability, the steps taken and the sentences read.

    The model writes Thoughts and chooses Actions; Observations come from the corpus, never from the model. With
    `stream: true` the steps come as server-sent events, the prediction last.
    """
    if ask.stream:
        events = services.predictions.stream(ask, is_cancelled)
        first = next(events)  # raises here, before any header is sent, when the request cannot be served
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
    except Exception as error:  # the status is sent already; the stream itself must say that it failed
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
    """Several run at a time. One that cannot be judged leaves a problem in its place."""
    if any(request.stream for request in ask.requests):
        raise InvalidError("a batch is not streamed; leave stream out", code="batch_not_streamed")
    _refuse_repeated_names([request.name for request in ask.requests])

    def work() -> tuple[int, dict[str, Any]]:
        answers = services.predictions.predict_batch(ask.requests, is_cancelled if key is None else never_cancelled)
        return 200, BatchAnswer(data=[_batch_entry(answer) for answer in answers]).model_dump(mode="json")

    status, answer = services.idempotency.run_once("POST /predict/batch", key, body, work, _final)
    return JSONResponse(answer, status)


def _refuse_repeated_names(names: list[str | None]) -> None:
    repeated = [place for place, name in enumerate(names) if name is not None and name in names[:place]]
    if repeated:
        found = tuple(Problem(("requests", place, "name"), "an earlier claim has this name") for place in repeated)
        raise InvalidError("each claim of a batch has a name of its own, or none", code="name_repeated", problems=found)


def _final(answer: dict[str, Any]) -> bool:
    """Whether no claim of a batch failed for a reason that passes: asked again, it may be judged."""
    return not any(one.get("status") in PASSING for one in answer["data"])


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
    """Stored when asked with `store: true`, and named when asked with a `name` besides."""
    return services.stored_predictions.get(prediction)


@router.delete(
    "/predictions/{prediction}", status_code=204, summary="Delete a stored prediction", responses=problems(404)
)
def delete_prediction(services: ServicesDep, prediction: Annotated[str, named("prediction")]) -> None:
    """Forget it; its name is free again."""
    services.stored_predictions.delete(prediction)

"""Predictions of requests with `store: true`, found by id or by name."""

from datetime import UTC, datetime

from sqlalchemy.exc import IntegrityError

from app.db import Database, Unit
from app.db.tables import PredictionRow
from app.domain.errors import ConflictError, NotFoundError, Problem
from app.domain.predictions import Prediction
from app.services.naming import check_name

NAME = "name"


class StoredPredictions:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, reference: str) -> Prediction:
        with self._database.read() as unit:
            return _to_prediction(_get_row(unit, reference))

    def delete(self, reference: str) -> None:
        with self._database.write() as unit:
            unit.predictions.delete(_get_row(unit, reference))

    def list_predictions(self, after: str | None, limit: int) -> tuple[list[Prediction], bool]:
        with self._database.read() as unit:
            rows, more = unit.predictions.list_predictions(after, limit)
        return [_to_prediction(row) for row in rows], more

    def refuse_taken(self, name: str | None) -> None:
        """Raise ConflictError if the name is taken. Called before the model runs, so that no run is wasted.

        Raises InvalidError for an invalid name.
        """
        if name is None:
            return
        check_name(name)
        with self._database.read() as unit:
            if unit.predictions.find(name) is not None:
                raise _name_taken(name)

    def add(self, prediction: Prediction) -> None:
        # The name is only a column: the previous version refuses an answer with a key that it does not know.
        answer = prediction.model_dump(mode="json", exclude={NAME})
        row = PredictionRow(id=prediction.id, name=prediction.name, answer=answer, created_at=datetime.now(UTC))
        try:
            with self._database.write() as unit:
                unit.predictions.add(row)
        except IntegrityError:  # taken while the model ran
            raise _name_taken(prediction.name) from None


def _get_row(unit: Unit, reference: str) -> PredictionRow:
    row = unit.predictions.find(reference)
    if row is None:
        raise NotFoundError(
            f"there is no stored prediction {reference!r}; GET /predictions lists them, and store: true keeps one",
            code="unknown_prediction",
        )
    return row


def _name_taken(name: str | None) -> ConflictError:
    message = f"there is a stored prediction named {name!r} already; choose another name or leave it out"
    return ConflictError(message, code="name_taken", problems=(Problem((NAME,), "taken"),))


def _to_prediction(row: PredictionRow) -> Prediction:
    return Prediction.model_validate(row.answer | {NAME: row.name})

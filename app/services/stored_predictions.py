"""Predictions that were asked for with `store: true`: kept under their ids, and under the names they were given."""

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
            return _view(_found(unit, reference))

    def delete(self, reference: str) -> None:
        with self._database.write() as unit:
            unit.predictions.delete(_found(unit, reference))

    def list_predictions(self, after: str | None, limit: int) -> tuple[list[Prediction], bool]:
        with self._database.read() as unit:
            rows, more = unit.predictions.list_predictions(after, limit)
        return [_view(row) for row in rows], more

    def refuse_taken(self, name: str | None) -> None:
        """ConflictError for a name that is taken already: worth asking before a model is run for it.

        InvalidError for one that cannot be a name.
        """
        if name is None:
            return
        check_name(name)
        with self._database.read() as unit:
            if unit.predictions.find(name) is not None:
                raise _taken(name)

    def add(self, prediction: Prediction) -> None:
        # The name is a column alone, so that the version before, which knows none, still reads the answer.
        answer = prediction.model_dump(mode="json", exclude={NAME})
        row = PredictionRow(id=prediction.id, name=prediction.name, answer=answer, created_at=datetime.now(UTC))
        try:
            with self._database.write() as unit:
                unit.predictions.add(row)
        except IntegrityError:  # taken while the model ran
            raise _taken(prediction.name) from None


def _found(unit: Unit, reference: str) -> PredictionRow:
    row = unit.predictions.find(reference)
    if row is None:
        raise NotFoundError(
            f"there is no stored prediction {reference!r}; GET /predictions lists them, and store: true keeps one",
            code="unknown_prediction",
        )
    return row


def _taken(name: str | None) -> ConflictError:
    message = f"there is a stored prediction named {name!r} already; choose another name or leave it out"
    return ConflictError(message, code="name_taken", problems=(Problem((NAME,), "taken"),))


def _view(row: PredictionRow) -> Prediction:
    return Prediction.model_validate(row.answer | {NAME: row.name})

"""What an evaluation's models answered, claim by claim."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.repositories.rows import put
from app.db.tables import EvaluationAnswerRow


class EvaluationAnswers:
    def __init__(self, session: Session) -> None:
        self._session = session

    def put(self, row: EvaluationAnswerRow) -> None:
        """Write an answer. If a resumed attempt judges a claim again, its row is replaced."""
        put(self._session, row)

    def list_answers(self, job_id: str) -> list[EvaluationAnswerRow]:
        wanted = select(EvaluationAnswerRow).where(EvaluationAnswerRow.job_id == job_id)
        return list(self._session.scalars(wanted.order_by(EvaluationAnswerRow.run, EvaluationAnswerRow.claim)))

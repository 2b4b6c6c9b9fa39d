"""Checks of a spec's split against the rows that each part of the dataset has."""

from app.db.tables import DatasetRow
from app.domain.errors import InvalidError, Problem
from app.domain.specs import TrainSpec
from app.domain.splits import SPLIT_NAMES
from app.services.encoded_rows import EncodingSummary

_COLUMN = ("preprocessing", "split", "column")


def check_split_column(named: str, dataset: DatasetRow) -> None:
    """Every row must name its part: no default, train or skip, would be right for the others."""
    column, said = dataset.report["columns"].get("split"), sum(dataset.report.get("splits", {}).values())
    if column is None or named not in ("split", column):
        known = "the dataset has no such column" if column is None else f"the dataset's column is {column!r}"
        hint = (
            "upload it with a column `split` of 0, 1, 2 (another name goes into split_column), or use type random"
            if column is None
            else f"write {column!r}, or leave column out"
        )
        raise _invalid(_COLUMN, f"a fixed split by {named!r}: {known}", hint)
    if said < dataset.rows:
        missing = dataset.rows - said
        hint = "fill the column with 0, 1, 2 (train, validation, test) and upload it again"
        raise _invalid(_COLUMN, f"{missing} of the dataset's {dataset.rows} rows name no part in {column!r}", hint)


def check_parts(spec: TrainSpec, summary: EncodingSummary) -> None:
    """Raise InvalidError if no row is left to train on, or no validation row for early stopping."""
    found = f"{summary.trained} train, {summary.validation} validation, {summary.test} test"
    key: tuple[str, ...] = ("preprocessing", "split")
    message, hint = "", "give another split, or other probabilities"
    if summary.trained == 0:
        message = f"no row is left to train on ({found})"
    elif spec.trainer.early_stop > 0 and summary.validation == 0:
        key, message = ("trainer", "early_stop"), f"there is no validation row to stop by ({found})"
        hint = "set preprocessing.split to {type: random, probabilities: [0.9, 0.1, 0]}, or early_stop to -1"
    if message:
        raise _invalid(key, message, hint)


def empty_parts(spec: TrainSpec, summary: EncodingSummary) -> list[str]:
    """Warnings for the parts of a random split that got no row. It happens with few rows and small shares."""
    split, counts = spec.preprocessing.split, (summary.trained, summary.validation, summary.test)
    if split.type == "fixed":
        return []
    return [
        f"no row fell into the {part} part, whose share is {share:g}"
        for part, share, rows in zip(SPLIT_NAMES, split.probabilities, counts, strict=True)
        if share > 0 and rows == 0
    ]


def _invalid(key: tuple[str, ...], message: str, hint: str) -> InvalidError:
    problem = Problem(key, message, hint)
    return InvalidError(f"{'.'.join(key)}: {message}", code="invalid_spec", problems=(problem,))

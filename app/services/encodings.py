"""A dataset's rows as token ids: encoded once per (dataset, tokenizer, format, policy), and stored as a blob.

The plan counts them and the training child reads them, so the trained rows are the planned ones.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from app.db import Database
from app.db.tables import DatasetRow, EncodingRow
from app.domain.encoding import Encoder
from app.domain.errors import InvalidError, NotFoundError, Problem
from app.domain.spec_parser import MAX_PROBLEMS
from app.domain.specs import TrainSpec
from app.services.encoded_rows import EncodingSummary, encode_rows
from app.storage import Blobs
from app.storage.blobs import hash_file

REVISION = 5
"""Increase it if the same inputs give other ids, so that blobs of older versions are not reused."""


class Encodings:
    """Encodes datasets and stores the result."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs

    def get_or_encode(
        self,
        dataset: DatasetRow,
        spec: TrainSpec,
        tokenizer: str,
        limit: int,
        encoder: Callable[[], Encoder],
    ) -> tuple[str, EncodingSummary]:
        """(blob of EncodedRow JSON lines, summary). `tokenizer` is its blob's digest, `limit` in tokens."""
        key = _key(dataset.digest, spec, tokenizer, limit)
        with self._database.read() as unit:
            known = unit.encodings.get(key)
        if known is not None and known.dataset and self._blobs.exists(known.blob):
            return known.blob, EncodingSummary.model_validate(known.summary)
        with tempfile.NamedTemporaryFile(prefix="veritune-rows-") as file:
            summary = encode_rows(self._read_lines(dataset), spec, limit, encoder(), file)
            file.flush()
            return self._store(key, dataset.digest, Path(file.name), summary), summary

    def _store(self, key: str, dataset: str, file: Path, summary: EncodingSummary) -> str:
        """Write the row, then its blob, so that no blob is without a row. `get_or_encode` encodes again if a blob is
        missing."""
        blob, _ = hash_file(file)
        row = EncodingRow(key=key, dataset=dataset, blob=blob, summary=summary.model_dump(mode="json"))
        with self._database.write() as unit:
            if unit.datasets.by_digest(dataset) is None:
                raise _dataset_deleted()
            unit.encodings.put(row)
        self._blobs.put_file(file)
        self._undo_if_deleted(key, blob)
        return blob

    def _undo_if_deleted(self, key: str, blob: str) -> None:
        """Delete the blob again if the dataset was deleted between row and blob: that deletion found no blob yet."""
        with self._database.read() as unit:
            if unit.encodings.get(key) is not None:
                return
            unreferenced = unit.encodings.unreferenced({blob})
        self._blobs.discard(unreferenced)
        raise _dataset_deleted()

    def _read_lines(self, dataset: DatasetRow) -> Iterator[bytes]:
        """The lines of the canonical JSONL, as a stream."""
        rest = b""
        for chunk in self._blobs.stream(dataset.digest):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        if rest:
            yield rest


def _dataset_deleted() -> NotFoundError:
    return NotFoundError("the dataset was deleted while its rows were encoded", code="unknown_dataset")


def _key(dataset: str, spec: TrainSpec, tokenizer: str, limit: int) -> str:
    parts = {
        "revision": REVISION,
        "dataset": dataset,
        "tokenizer": tokenizer,
        "format": spec.format().model_dump(),
        "limit": limit,
        "overlength": spec.preprocessing.overlength,
        "observations": spec.trainer.train_on_observations,
        "branch": spec.trainer.verdict_branch,
        "verdict_rows": spec.trainer.verdict_rows,
        "split": spec.preprocessing.split.model_dump(exclude={"column"}),
        "seed": spec.seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def refuse_overlength(summary: EncodingSummary, limit: int) -> None:
    """Raise InvalidError if the policy is `refuse` and rows were too long, or if no row is left."""
    if summary.refused:
        found = tuple(
            Problem(("dataset", "rows", n.line), f"{n.tokens} tokens; at most {limit} fit")
            for n in summary.notes[:MAX_PROBLEMS]
        )
        raise InvalidError(
            f"{summary.refused} rows are longer than {limit} tokens and preprocessing.overlength is refuse; "
            "use trim_observations or drop, or raise global_max_sequence_length",
            code="rows_too_long",
            problems=found,
        )
    if summary.usable_rows == 0:
        raise InvalidError(
            f"no row fits {limit} tokens; raise preprocessing.global_max_sequence_length", code="no_row_fits"
        )

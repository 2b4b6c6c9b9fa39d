"""A dataset's rows as token ids: encoded once per (dataset, tokenizer, format, policy), and stored as a blob.

The plan counts them and the training child reads them, so the trained rows are the planned ones.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from app.db import Database
from app.db.tables import DatasetRow, EncodingRow
from app.domain.attempts import EncodedBranch, EncodedRow
from app.domain.datasets import read_canonical
from app.domain.encoding import EncodedSequence, Encoder
from app.domain.errors import InvalidError, NotFoundError, Problem
from app.domain.frozen import Frozen
from app.domain.plans import OverlengthRow, TokenLengths
from app.domain.react import CLOSE, END, build_label
from app.domain.spec_parser import MAX_PROBLEMS
from app.domain.specs import TrainSpec
from app.domain.splits import SplitName, draw_split
from app.domain.trajectories import Trajectory
from app.storage import Blobs
from app.storage.blobs import hash_file

MAX_NOTES = 10_000
REVISION = 5
"""Increase it if the same inputs give other ids, so that blobs of older versions are not reused."""


class EncodingSummary(Frozen):
    """The counts of one encoding. `notes` lists at most 10,000 rows; the counts are exact.

    `branches`, `tokens`, `labelled_tokens` and `lengths` count the rows of the train part, `longest` all rows.
    """

    rows: int
    trained: int
    validation: int = 0
    test: int = 0
    trimmed: int
    protected: int
    dropped: int
    refused: int
    branches: int
    tokens: int
    labelled_tokens: int
    longest: int
    lengths: TokenLengths
    notes: tuple[OverlengthRow, ...]

    @property
    def usable_rows(self) -> int:
        """Rows of all parts that were not dropped."""
        return self.trained + self.validation + self.test

    @property
    def protected_share(self) -> float:
        """Share of the usable rows that were trimmed around a quotation."""
        return self.protected / self.usable_rows


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
            summary = _encode(self._read_lines(dataset), spec, limit, encoder(), file)
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
        "split": spec.preprocessing.split.model_dump(exclude={"column"}),
        "seed": spec.seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Tally:
    """Counts over a stream of rows."""

    def __init__(self) -> None:
        self.rows = self.trimmed = self.protected = self.dropped = self.refused = self.branches = 0
        self.tokens = self.labelled = self.longest = 0
        self.parts: Counter[SplitName] = Counter()
        self.lengths: list[int] = []
        self.notes: list[OverlengthRow] = []

    def note(self, note: OverlengthRow) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes.append(note)

    def row(self, row: EncodedRow, labelled: int) -> EncodedRow:
        self.parts[row.part] += 1
        self.longest = max(self.longest, len(row.all_ids))
        if row.part is SplitName.TRAIN:
            self.lengths.append(len(row.ids))
            self.branches += row.branch is not None
            self.tokens += len(row.all_ids)
            self.labelled += labelled
        return row


def _encode(lines: Iterator[bytes], spec: TrainSpec, limit: int, encoder: Encoder, out: IO[bytes]) -> EncodingSummary:
    tally = _Tally()
    for number, line in enumerate(lines, start=1):
        tally.rows += 1
        trajectory = _fit_to_limit(read_canonical(line), number, spec, limit, encoder, tally)
        if trajectory is None:
            continue
        row = _encode_row(trajectory, number, spec, encoder, tally)
        out.write(row.model_dump_json(exclude_defaults=True).encode() + b"\n")
    return EncodingSummary(
        rows=tally.rows,
        trained=tally.parts[SplitName.TRAIN],
        validation=tally.parts[SplitName.VALIDATION],
        test=tally.parts[SplitName.TEST],
        trimmed=tally.trimmed,
        protected=tally.protected,
        dropped=tally.dropped,
        refused=tally.refused,
        branches=tally.branches,
        tokens=tally.tokens,
        labelled_tokens=tally.labelled,
        longest=tally.longest,
        lengths=TokenLengths.measure(tally.lengths),
        notes=tuple(tally.notes),
    )


def _fit_to_limit(
    trajectory: Trajectory, line: int, spec: TrainSpec, limit: int, encoder: Encoder, tally: _Tally
) -> Trajectory | None:
    """The trajectory after the over-length policy; None if it is dropped. Its end is never cut."""
    policy = spec.preprocessing.overlength
    whole = _encode_trajectory(trajectory, spec, encoder)
    before = len(whole.ids)
    if policy == "trim_observations":
        shorter = encoder.trim_observations(trajectory, limit)
        left = _encode_trajectory(shorter.trajectory, spec, encoder) if shorter.observations else whole
        if len(left.ids) <= limit:
            if shorter.observations:
                tally.trimmed += 1
                tally.protected += shorter.protected
                action = "protected" if shorter.protected else "trimmed"
                lost = whole.labelled - left.labelled
                kept_tokens = len(left.ids)
                tally.note(
                    OverlengthRow(
                        line=line, tokens=before, kept_tokens=kept_tokens, action=action, labelled_tokens_lost=lost
                    )
                )
            return shorter.trajectory
    elif before <= limit:
        return trajectory
    elif policy == "refuse":
        tally.refused += 1
        tally.note(OverlengthRow(line=line, tokens=before, kept_tokens=0, action="refused"))
        return None
    tally.dropped += 1
    tally.note(
        OverlengthRow(line=line, tokens=before, kept_tokens=0, action="dropped", labelled_tokens_lost=whole.labelled)
    )
    return None


def _encode_trajectory(trajectory: Trajectory, spec: TrainSpec, encoder: Encoder) -> EncodedSequence:
    observations = spec.trainer.train_on_observations
    return encoder.encode(encoder.form.render_trajectory(trajectory, train_on_observations=observations))


def _encode_row(trajectory: Trajectory, line: int, spec: TrainSpec, encoder: Encoder, tally: _Tally) -> EncodedRow:
    whole, part = _encode_trajectory(trajectory, spec, encoder), _choose_part(trajectory, line, spec)
    # The verdict, CLOSE and END are the last segments, with and without the branch.
    from_end = sum(len(encoder.encode_segment(segment)) for segment in (build_label(trajectory.verdict), CLOSE, END))
    verdict = len(whole.ids) - from_end
    if not _has_branch(line, spec):
        row = EncodedRow(line=line, ids=whole.ids, trained=whole.trained, verdict=verdict, part=part)
        return tally.row(row, whole.labelled)
    branch = encoder.encode(encoder.form.render_labelled_branch(trajectory))
    at = encoder.count_tokens(encoder.form.render_prompt(trajectory.claim, trajectory.steps[:-1]))
    trained = tuple((start - at, end - at) for start, end in branch.trained)
    own = EncodedBranch(at=at, ids=branch.ids[at:], trained=trained, verdict=len(branch.ids) - at - from_end)
    row = EncodedRow(line=line, ids=whole.ids, trained=whole.trained, verdict=verdict, branch=own, part=part)
    return tally.row(row, whole.labelled + branch.labelled)


def _has_branch(line: int, spec: TrainSpec) -> bool:
    """Whether a row has the labelled verdict branch. A fixed share of rows has it, drawn by seed and row."""
    return _draw_uniform(f"{spec.seed}:{line}") < spec.trainer.verdict_branch


def _choose_part(trajectory: Trajectory, line: int, spec: TrainSpec) -> SplitName:
    """The part that a row belongs to: its own `split`, or one drawn by seed and row."""
    split = spec.preprocessing.split
    if split.type == "fixed":
        return trajectory.split or SplitName.TRAIN
    return draw_split(_draw_uniform(f"{spec.seed}:{line}:part"), split.probabilities)


def _draw_uniform(text: str) -> float:
    """A number in [0, 1), the same on every machine: a hash of `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32


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

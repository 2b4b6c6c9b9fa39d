"""Encodes a dataset's rows as token ids, by the policy of a spec, and counts them.

The over-length policy comes first. Then a training row is encoded whole, with a verdict branch, or as a verdict row.
"""

from collections import Counter
from collections.abc import Iterator
from typing import IO

from app.domain.attempts import EncodedBranch, EncodedRow
from app.domain.datasets import read_canonical
from app.domain.encoding import EncodedSequence, Encoder
from app.domain.frozen import Frozen
from app.domain.plans import OverlengthRow, TokenLengths
from app.domain.react import CLOSE, END, build_label
from app.domain.specs import TrainSpec
from app.domain.splits import SplitName, draw_split, draw_uniform
from app.domain.trajectories import Trajectory
from app.domain.verdict_rows import reduce_to_quotations

MAX_NOTES = 10_000


class EncodingSummary(Frozen):
    """The counts of one encoding. `notes` lists at most 10,000 rows; the counts are exact.

    `branches`, `verdict_rows`, `tokens`, `labelled_tokens` and `lengths` count the rows of the train part. `longest`
    is of all rows.
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
    verdict_rows: int = 0
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


class _Tally:
    """Counts over a stream of rows."""

    def __init__(self) -> None:
        self.rows = self.trimmed = self.protected = self.dropped = self.refused = self.branches = 0
        self.verdict_rows = self.tokens = self.labelled = self.longest = 0
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


def encode_rows(
    lines: Iterator[bytes], spec: TrainSpec, limit: int, encoder: Encoder, out: IO[bytes]
) -> EncodingSummary:
    """Write the dataset's rows to `out`, as JSON lines of EncodedRow. `lines`: its canonical JSONL. `limit`: tokens."""
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
        verdict_rows=tally.verdict_rows,
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
    part = _choose_part(trajectory, line, spec)
    # The verdict, CLOSE and END are the last segments, with and without the branch.
    from_end = sum(len(encoder.encode_segment(segment)) for segment in (build_label(trajectory.verdict), CLOSE, END))
    if part is SplitName.TRAIN and _is_verdict_row(line, spec):
        short = encoder.encode(encoder.form.render_labelled_branch(reduce_to_quotations(trajectory)))
        row = EncodedRow(line=line, ids=short.ids, trained=short.trained, verdict=len(short.ids) - from_end, part=part)
        tally.verdict_rows += 1
        return tally.row(row, short.labelled)
    whole = _encode_trajectory(trajectory, spec, encoder)
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
    return draw_uniform(f"{spec.seed}:{line}") < spec.trainer.verdict_branch


def _is_verdict_row(line: int, spec: TrainSpec) -> bool:
    """Whether only the verdict of a training row is learned. A fixed share of them, drawn by seed and row."""
    return draw_uniform(f"{spec.seed}:{line}:verdict") < spec.trainer.verdict_rows


def _choose_part(trajectory: Trajectory, line: int, spec: TrainSpec) -> SplitName:
    """The part that a row belongs to: its own `split`, or one drawn by seed and row."""
    split = spec.preprocessing.split
    if split.type == "fixed":
        return trajectory.split or SplitName.TRAIN
    return draw_split(draw_uniform(f"{spec.seed}:{line}:part"), split.probabilities)

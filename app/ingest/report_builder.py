"""Decides which rows of an upload are kept, and counts what the report tells.

Memory grows only with the number of different text lengths. The duplicate index is on disk.
"""

from bisect import bisect_right
from collections import Counter
from itertools import accumulate

from app.domain.claims import Verdict
from app.domain.datasets import (
    FINDINGS_LIMIT,
    FINDINGS_PER_CODE,
    Columns,
    DatasetReport,
    Finding,
    Severity,
    SourceRow,
    TextLengths,
    build_finding,
    canonical_line,
)
from app.domain.errors import InvalidError
from app.domain.rows import RowResult, read_row
from app.domain.splits import SplitName
from app.domain.trajectories import Trajectory
from app.ingest.duplicates import DuplicateIndex
from app.ingest.lines import Header, Item

_NAMES_LIMIT = 200
_TEXTS = ("claim", "thought", "observation", "trajectory")


class DatasetReportBuilder:
    """Add the items of a file one by one with `add`; `build` makes the report."""

    def __init__(self, columns: Columns, rows_limit: int, duplicates: DuplicateIndex) -> None:
        self.columns = columns
        self.rows_limit = rows_limit
        self.names: dict[str, bool] = {}  # each column name in the file → whether it is read
        self.roles: dict[str, str] = {}
        self.codes: Counter[str] = Counter()
        self.findings: list[Finding] = []
        self.read_rows = self.kept = self.repaired = self.warned = self.refused = 0
        self.labels: Counter[Verdict] = Counter()
        self.steps: Counter[int] = Counter()
        self.actions: Counter[str] = Counter()
        self.splits: Counter[SplitName] = Counter()
        self.lengths: dict[str, Counter[int]] = {name: Counter() for name in _TEXTS}
        self._duplicates = duplicates

    def add(self, item: Item) -> bytes | None:
        """Returns the canonical line of a kept row, else None. Raises InvalidError `too_many_rows`."""
        if isinstance(item, Header):
            self._note_columns(item.line, item.names, item.used)
            return None
        self.read_rows += 1
        if self.read_rows > self.rows_limit:
            raise InvalidError(
                f"line {item.line}: a dataset has at most {self.rows_limit:,} rows; send fewer",
                code="too_many_rows",
            )
        if isinstance(item, Finding):
            self._note((item,))
            self.refused += 1
            return None
        return self._add_row(item)

    def _add_row(self, row: SourceRow) -> bytes | None:
        reading = read_row(row, self.columns)
        self._note_columns(row.line, tuple(row.fields), self._used_columns(row, reading.source))
        self._note(reading.findings)
        if reading.trajectory is None:
            self.refused += 1
            return None
        return self._keep_unless_duplicate(row.line, reading.trajectory, reading)

    def _keep_unless_duplicate(self, line: int, trajectory: Trajectory, reading: RowResult) -> bytes | None:
        texts = [trajectory.claim]
        if self.columns.kind == "claims":
            texts += (trajectory.page or "", str(trajectory.evidence))
        for step in trajectory.steps:
            texts += (step.thought, str(step.action), step.observation or "")
        if self._duplicates.get_or_insert("\0".join(texts), "row"):  # texts hold no NUL, so no claim equals a row
            self._note((build_finding(line, "duplicate", "the row repeats an earlier one, which is kept"),))
            self.warned += 1
            return None
        conflicts = self._note_conflict(line, trajectory.claim, trajectory.verdict)
        severities = {found.severity for found in reading.findings}
        self.kept += 1
        self.repaired += Severity.REPAIRED in severities
        self.warned += conflicts or Severity.WARNED in severities
        self._measure(trajectory, sum(map(len, texts)))
        return canonical_line(trajectory)

    def _note_conflict(self, line: int, claim: str, verdict: Verdict) -> bool:
        first = self._duplicates.get_or_insert(claim, verdict.value)
        if first in (None, verdict.value):
            return False
        message = f"the claim came before as {first} and is {verdict.value} here; both are kept"
        self._note((build_finding(line, "conflicting_label", message),))
        return True

    def _measure(self, trajectory: Trajectory, characters: int) -> None:
        self.labels[trajectory.verdict] += 1
        self.steps[len(trajectory.steps)] += 1
        if trajectory.split is not None:
            self.splits[trajectory.split] += 1
        self.lengths["claim"][len(trajectory.claim)] += 1
        self.lengths["trajectory"][characters] += 1
        for step in trajectory.steps:
            self.actions[step.action.name.value] += 1
            self.lengths["thought"][len(step.thought)] += 1
            if step.observation is not None:
                self.lengths["observation"][len(step.observation)] += 1

    def _used_columns(self, row: SourceRow, source: str) -> frozenset[str]:
        evidence = "" if isinstance(row.fields.get("evidence"), str) else "evidence"
        empty = [name for name in ("evidence", "steps", "messages") if row.fields.get(name, "") is None]
        columns = self.columns
        steps = () if columns.kind == "claims" else (columns.trajectories,)
        own = (columns.claim, *steps, columns.label, columns.page, columns.split)
        return frozenset((*own, source, evidence, *empty))

    def _note_columns(self, line: int, names: tuple[str, ...], used: frozenset[str]) -> None:
        """Records column names at their first occurrence; each unread column is one finding."""
        for name in names:
            if name in self.names or len(self.names) >= _NAMES_LIMIT:
                continue
            self.names[name] = name in used
            if name not in used:
                message = f"the column {name[:60]!r} is not read"
                self._note((build_finding(line, "extra_column", message),))
        columns = self.columns
        roles = {"claim": columns.claim, "label": columns.label, "page": columns.page, "split": columns.split}
        for role, name in roles.items():
            if name in used and name in names:
                self.roles.setdefault(role, name)
        for name in (self.columns.trajectories, "steps", "messages"):
            if name in used and name in names:
                self.roles.setdefault("trajectories", name)

    def _note(self, findings: tuple[Finding, ...]) -> None:
        for found in findings:
            self.codes[found.code] += 1
            if len(self.findings) < FINDINGS_LIMIT and self.codes[found.code] <= FINDINGS_PER_CODE:
                self.findings.append(found)

    def build(self, format_name: str) -> DatasetReport:
        return DatasetReport(
            format=format_name,
            columns=self.roles,
            rows_read=self.read_rows,
            rows_kept=self.kept,
            rows_repaired=self.repaired,
            rows_warned=self.warned,
            rows_refused=self.refused,
            codes=dict(sorted(self.codes.items())),
            labels={verdict: self.labels[verdict] for verdict in Verdict},
            steps=dict(sorted(self.steps.items())),
            actions=dict(sorted(self.actions.items())),
            characters={name: _lengths(values) for name, values in self.lengths.items() if values},
            splits={part: self.splits[part] for part in SplitName if self.splits},
            findings=tuple(self.findings),
            findings_left_out=self.codes.total() - len(self.findings),
        )


def _lengths(counts: Counter[int]) -> TextLengths:
    ordered = sorted(counts.items())
    ends = list(accumulate(count for _, count in ordered))
    last = ends[-1] - 1

    def at(rank: int) -> int:
        return ordered[bisect_right(ends, rank)][0]

    return TextLengths(
        shortest=at(0),
        median=at(last // 2),
        p95=at(last * 95 // 100),
        longest=at(last),
        total=sum(length * count for length, count in ordered),
    )

"""Datasets: findings about an upload, its report, and the canonical form of a row.

A dataset is an immutable, ordered set of trajectories. Its digest is the SHA-256 of its canonical lines.
`app.domain.rows` reads a row of an upload, and `app.ingest` reads a file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import Field

from app.domain.claims import Verdict
from app.domain.frozen import Frozen
from app.domain.splits import SplitName
from app.domain.trajectories import Evidence, Step, Trajectory, parse_action


class Severity(StrEnum):
    """What a finding means for its row: kept after a repair, kept with a warning, or left out."""

    REPAIRED = "repaired"
    WARNED = "warned"
    REFUSED = "refused"


_MEANINGS: dict[Severity, dict[str, str]] = {
    Severity.REPAIRED: {
        "finish_missing_with_label": "the trajectory stops without Finish; the label finishes it",
        "finish_done": "Finish holds no verdict, such as Finish[DONE]; the label takes its place",
        "label_prefix": "`Label: …` stands before the first step; it is read and removed",
        "preamble_dropped": "other text stands before the first step; it is removed",
        "episode_tail": "`Observation n: Episode finished …` stands behind Finish; it is removed",
        "newline_folded": "a claim, thought, action or observation spans lines; it becomes one line",
        "verdict_spelling": "a verdict is spelled in another way, such as `Supported`",
        "markup_removed": "step markers stand in Markdown, such as `**Thought 1:**`; they are read without it",
        "markers_numbered": "`Thought:`, `Action:` and `Observation:` have no numbers; they are numbered",
        "stray_bracket": "a last thought without an action ends in an unopened `]`; it is removed",
    },
    Severity.WARNED: {
        "duplicate": "the same claim with the same steps came before; the first is kept",
        "conflicting_label": "the same claim came before with another verdict; both are kept",
        "claim_passed_over": "a chat holds another text that could be the claim; the column or last `Claim:` is read",
        "message_passed_over": "a system message stands between a chat's steps; it is not read",
        "control_token_text": "a text names a control token, such as `<|im_end|>`; it is trained as text",
        "extra_column": "a column that is not read; reported once for each column of a file",
        "extra_key": "a step has keys that are not read",
        "bad_label": "a label is no verdict; it is not used",
        "bad_evidence": "the evidence is not a list of [page, sentence number]; what cannot be read is left out",
        "bad_page": "the page is not a title; it is not used",
        "claim_column_unread": "a chat row's claim column holds no text; the claim is taken from the messages",
        "bad_split": "the split is not 0, 1, 2, train, validation or test; the row is kept without one",
    },
    Severity.REFUSED: {
        "missing_claim": "the row has no claim",
        "bad_claim": "the claim is no text, is too long, or holds a step marker",
        "missing_trajectory": "the row has no trajectory",
        "no_steps": "the trajectory's text holds no `Thought 1:` marker, or its list of steps is empty",
        "bad_step": "a structured step is not an object of texts, or a field of it holds a step marker",
        "bad_messages": "a chat row is not a list of messages with a role and a text",
        "ambiguous_claim": "two texts of a chat could be the claim, or one names another claim behind the first answer",
        "no_verdict": "neither Finish nor a label gives a verdict",
        "verdict_mismatch": "Finish, the label column and `Label:` do not agree",
        "step_without_action": "a step before the last has no action",
        "unknown_action": "an action is not Search[…], Lookup[…] or Finish[…]",
        "bad_argument": "an action's argument is empty, too long, or holds brackets",
        "empty_observation": "a Search or Lookup has no observation",
        "finish_not_last": "something follows Finish",
        "forbidden_character": "a text holds a NUL or a lone surrogate",
        "bad_utf8": "the row is not UTF-8",
        "bad_json": "the row is not JSON",
        "repeated_key": "an object in the row names a key more than once",
        "not_an_object": "the row is JSON, but no object",
        "bad_csv": "a quote is not closed, or text follows a closing quote",
        "wrong_fields": "the row has more or fewer fields than the header",
        "line_too_long": "the row is longer than a row may be",
    },
}

SEVERITY_BY_CODE: dict[str, Severity] = {code: severity for severity, codes in _MEANINGS.items() for code in codes}
"""Every code that a finding may have."""

CODE_MEANINGS: dict[str, str] = {code: text for codes in _MEANINGS.values() for code, text in codes.items()}
"""Each code's meaning in a sentence. docs/http.md prints this table."""

FINDINGS_LIMIT = 200
"""A report lists at most so many findings. Its counts are exact."""

FINDINGS_PER_CODE = 20
"""A report lists at most so many findings of one code, so that a frequent code does not hide a rare one."""


class Finding(Frozen):
    """A repair, a warning or a refusal of one row.

    `line` is its line in the uploaded file, from 1 (in Parquet its row).
    """

    line: int
    code: str
    severity: Severity
    message: str


def build_finding(line: int, code: str, message: str) -> Finding:
    """A finding with the severity that its code has. Raises KeyError for a code that is not in `SEVERITY_BY_CODE`."""
    return Finding(line=line, code=code, severity=SEVERITY_BY_CODE[code], message=message)


RowKind = Literal["trajectories", "claims"]
"""What an upload's rows are: trajectories with their steps, or claims with labels only."""


class Columns(Frozen):
    """Names of the upload's columns. `kind`: what its rows are."""

    kind: RowKind = "trajectories"
    claim: str = "claim"
    trajectories: str = "trajectories"
    label: str = "label"
    page: str = "page"
    split: str = "split"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as the file has it. Nothing in it is checked yet."""

    line: int
    fields: Mapping[str, object]


class TextLengths(Frozen):
    """Lengths of texts, in characters."""

    shortest: int
    median: int
    p95: int
    longest: int
    total: int


class DatasetReport(Frozen):
    """Exact counts of an upload.

    `rows_read` = `rows_kept` + `rows_refused` + `codes["duplicate"]`. `rows_repaired` counts kept rows.
    `rows_warned` counts kept rows and duplicates. `codes`: number of rows with a finding of each code, refused rows
    included (`extra_column` counts columns). `labels`, `steps` (trajectories by their number of steps), `actions`,
    `characters` and `splits` (rows that name a split) describe the kept rows.
    """

    format: str
    columns: dict[str, str]
    rows_read: int
    rows_kept: int
    rows_repaired: int
    rows_warned: int
    rows_refused: int
    codes: dict[str, int]
    labels: dict[Verdict, int]
    steps: dict[int, int]
    actions: dict[str, int]
    characters: dict[str, TextLengths]
    splits: dict[SplitName, int] = Field(default_factory=dict)
    findings: tuple[Finding, ...]
    findings_left_out: int


_CANONICAL = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True, check_circular=False)


def canonical_line(trajectory: Trajectory) -> bytes:
    """The trajectory as one line of canonical JSONL: sorted keys, no spaces, UTF-8, a newline at the end.

    A row without a split has no key `split`, and one without a page no key `page`. So datasets of earlier versions,
    which had neither, keep their digests.
    """
    steps = [
        {"action": str(step.action), "observation": step.observation, "thought": step.thought}
        for step in trajectory.steps
    ]
    row: dict[str, object] = {
        "claim": trajectory.claim,
        "evidence": [[item.page, item.sentence] for item in trajectory.evidence],
        "label": trajectory.verdict.value,
        "steps": steps,
    }
    if trajectory.page is not None:
        row["page"] = trajectory.page
    if trajectory.split is not None:
        row["split"] = trajectory.split.value
    return _CANONICAL.encode(row).encode() + b"\n"


def read_canonical(line: bytes) -> Trajectory:
    """The inverse of `canonical_line`. Raises ValueError or KeyError for a line that it did not write."""
    row = json.loads(line)
    steps = tuple(
        Step(thought=step["thought"], action=parse_action(step["action"]), observation=step["observation"])
        for step in row["steps"]
    )
    evidence = tuple(Evidence(page=page, sentence=sentence) for page, sentence in row["evidence"])
    trajectory = Trajectory(
        claim=row["claim"], steps=steps, evidence=evidence, page=row.get("page"), split=row.get("split")
    )
    if row["label"] != trajectory.verdict:
        raise ValueError(f"labelled {row['label']!r}, but finishes with {trajectory.verdict.value!r}")
    return trajectory

"""Parses one row of an upload as a trajectory, and lists what was repaired or why the row was refused.

A row is refused for the first reason found, in this order: its format, its claim, verdicts that contradict each other,
its steps. A bad value in an optional column (label, split, evidence) is left out with a warning; the row stays. Text is
put in NFC, with single spaces; only a removed newline is a finding. `app.domain.row_formats` reads the steps before.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pydantic import ValidationError

from app.domain.chat import ChatClaim
from app.domain.claims import (
    STEP_MARKER,
    Verdict,
    check_claim,
    forbidden_character,
    is_blank,
    parse_verdict,
    to_one_line,
)
from app.domain.datasets import Columns, Finding, SourceRow
from app.domain.evidence import read_evidence
from app.domain.react import RawStep
from app.domain.row_formats import (
    STEP_KEYS,
    RawTrajectory,
    RefusedError,
    RowFindings,
    find_steps_column,
    read_raw_trajectory,
    refuse_forbidden_character,
)
from app.domain.splits import SplitName, read_split_name
from app.domain.trajectories import Action, ActionName, Evidence, Step, Trajectory, parse_action

PAGE_LIMIT = 300
"""Longest title of a claim's page, in characters."""

_LABEL = re.compile(r"\bLabel\s*:")
_FINISH = re.compile(r"finish\s*(?:\[(.*)\])?\.?", re.IGNORECASE | re.DOTALL)
_TAIL = re.compile(r"(?:Episode finished\b.*)?", re.IGNORECASE | re.DOTALL)
_CONTROL_TOKEN = re.compile(r"<\|\w[\w ./-]{0,38}\|>|</?s>|\[/?INST\]|<(?:bos|eos|pad|start_of_turn|end_of_turn)>")
_SPELL = "write SUPPORTS, REFUTES or NOT ENOUGH INFO"


@dataclass(frozen=True, slots=True)
class RowResult:
    """The result of parsing a row. `source`: the column of its steps, "" if no column has any."""

    trajectory: Trajectory | None
    label: Verdict | None
    findings: tuple[Finding, ...]
    source: str


def read_row(row: SourceRow, columns: Columns) -> RowResult:
    """Parses a row.

    A refused row has no trajectory; its findings say why. Never raises because of the row's content.
    """
    findings = RowFindings(row.line)
    source, value = find_steps_column(row, columns)
    label, trajectory = None, None
    try:
        if columns.kind == "claims":
            source, written = "", RawTrajectory(ChatClaim(), "", [])
        else:
            written = read_raw_trajectory(value, source, findings)
        claim = _read_claim(row.fields.get(columns.claim), written.claim, columns.claim, findings)
        label = _read_label(row.fields.get(columns.label), columns.label, findings)
        evidence = _read_evidence(row.fields.get("evidence"), findings)
        if columns.kind == "claims":
            trajectory = _build_claim_only(claim, label, columns.label, evidence, findings)
        else:
            trajectory = _build_trajectory(claim, written, label, evidence, findings)
        if (page := _read_page(row.fields.get(columns.page), columns.page, findings)) is not None:
            trajectory = trajectory.model_copy(update={"page": page})
        if (split := _read_split(row.fields.get(columns.split), columns.split, findings)) is not None:
            trajectory = trajectory.model_copy(update={"split": split})
    except RefusedError as refused:
        findings.add(refused.code, refused.message)
    return RowResult(trajectory, label, tuple(findings.by_code.values()), source)


# --- claim, label, evidence ----------------------------------------------------------------


def _read_claim(given: object, chat: ChatClaim, name: str, findings: RowFindings) -> str:
    in_chat = chat.text is not None or chat.ambiguity is not None
    if in_chat and given is not None and not isinstance(given, str):
        findings.add("claim_column_unread", f"{name!r} is not text; the claim is taken from the messages")
        given = None
    claim = given if given is not None and not _is_blank(given) else _read_chat_claim(chat, findings)
    if claim is None or _is_blank(claim):
        raise RefusedError("missing_claim", f"the row has no claim in {name!r}; fill it or drop the row")
    if not isinstance(claim, str):
        raise RefusedError("bad_claim", f"{name!r} is not text; a claim is one sentence")
    refuse_forbidden_character(claim, "the claim")
    _note_newlines(claim, "the claim", findings)
    if claim is given:
        _note_other_claims([named for named in chat.named if to_one_line(named) != to_one_line(claim)], findings)
    try:
        return check_claim(claim)
    except ValueError as error:
        raise RefusedError("bad_claim", str(error)) from None


def _read_chat_claim(chat: ChatClaim, findings: RowFindings) -> str | None:
    if chat.ambiguity:
        raise RefusedError("ambiguous_claim", chat.ambiguity)
    _note_other_claims(chat.ignored, findings)
    return chat.text


def _note_other_claims(ignored: Sequence[str], findings: RowFindings) -> None:
    if ignored:
        findings.add("claim_passed_over", f"{to_one_line(ignored[0])[:60]!r} in the messages is not read as the claim")


def _read_label(value: object, name: str, findings: RowFindings) -> Verdict | None:
    if value is None or _is_blank(value):
        return None
    match value:
        case str(text) | [str(text)]:
            return _read_verdict(text, f"the label in {name!r}", findings)
    findings.add("bad_label", f"the label in {name!r} is not text and is not used; {_SPELL}")
    return None


def _read_verdict(text: str, where: str, findings: RowFindings) -> Verdict | None:
    verdict = parse_verdict(text)
    if verdict is None:
        findings.add("bad_label", f"{where} is {text.strip()[:40]!r} and is not used; {_SPELL}")
        return None
    _note_spelling(text, verdict, findings)
    return verdict


def _note_spelling(text: str, verdict: Verdict, findings: RowFindings) -> None:
    if text.strip() != verdict.value:
        findings.add("verdict_spelling", f"{text.strip()[:40]!r} is read as {verdict.value}")


def _read_evidence(value: object, findings: RowFindings) -> tuple[Evidence, ...]:
    evidence, unread = read_evidence(value)
    if unread:
        findings.add("bad_evidence", f"{unread:,} items of `evidence` are not [page, sentence number] and are left out")
    return evidence


def _read_page(value: object, name: str, findings: RowFindings) -> str | None:
    """The title of the claim's page. A bad value is a warning only."""
    if value is None or _is_blank(value):
        return None
    title = to_one_line(value) if isinstance(value, str) and not forbidden_character(value) else ""
    if not title or len(title) > PAGE_LIMIT or STEP_MARKER.search(title):
        findings.add("bad_page", f"{name!r} is not a page's title and is not used")
        return None
    return title


def _read_split(value: object, name: str, findings: RowFindings) -> SplitName | None:
    """The row's split. A bad value is a warning only, because many files have a `split` column of another meaning."""
    try:
        return read_split_name(value)
    except ValueError as error:
        findings.add("bad_split", f"{name!r}: {error}")
        return None


# --- from raw steps to a trajectory --------------------------------------------------------


def _build_trajectory(
    claim: str, written: RawTrajectory, label: Verdict | None, evidence: tuple[Evidence, ...], findings: RowFindings
) -> Trajectory:
    prefix = _read_preamble(written.preamble, claim, findings)
    steps = [_drop_episode_tail(step, findings) for step in written.steps]
    for number, step in enumerate(steps, start=1):
        for name, text in zip(STEP_KEYS, (step.thought, step.action, step.observation), strict=True):
            _note_newlines(text or "", f"{name} {number}", findings)
    if label and prefix and label is not prefix:
        raise _build_mismatch(f"the label column says {label.value}", f"`Label:` says {prefix.value}")
    finished = _end_with_finish(steps, label or prefix, findings)
    last = len(finished)
    built = tuple(_build_step(raw, number, number == last) for number, raw in enumerate(finished, start=1))
    _note_control_tokens(claim, built, findings)
    return Trajectory(claim=claim, steps=built, evidence=evidence)


def _build_claim_only(
    claim: str, label: Verdict | None, name: str, evidence: tuple[Evidence, ...], findings: RowFindings
) -> Trajectory:
    if label is None:
        raise RefusedError("no_verdict", f"the row has no label that is a verdict in {name!r}; {_SPELL}")
    _note_control_tokens(claim, (), findings)
    finish = Step(thought="", action=Action(name=ActionName.FINISH, argument=label.value))
    return Trajectory(claim=claim, steps=(finish,), evidence=evidence)


def _note_control_tokens(claim: str, steps: Sequence[Step], findings: RowFindings) -> None:
    written = [
        (f"step {n}", text) for n, s in enumerate(steps, 1) for text in (s.thought, str(s.action), s.observation)
    ]
    for where, text in [("the claim", claim), *written]:
        if text and (found := _CONTROL_TOKEN.search(text)):
            said = f"{where} holds {found[0]!r}, which a chat template may have left; it is trained as text"
            findings.add("control_token_text", said)


def _build_mismatch(one: str, other: str) -> RefusedError:
    return RefusedError("verdict_mismatch", f"{one}, {other}; correct one of them or leave the row out")


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and is_blank(value)


def _note_newlines(text: str, where: str, findings: RowFindings) -> None:
    if len(text.strip().splitlines()) > 1:
        findings.add("newline_folded", f"{where} spans lines; they are joined by spaces")


def _read_preamble(preamble: str, claim: str, findings: RowFindings) -> Verdict | None:
    """The verdict of `Label: …` before the first step. Other text there is left out, with a finding."""
    if _LABEL.search(claim):
        preamble = to_one_line(preamble).replace(claim, " ", 1)
    found = list(_LABEL.finditer(preamble))
    before = preamble[: found[-1].start()] if found else preamble
    rest = to_one_line(before).strip("# ").removeprefix("Claim:").strip()
    if rest and rest != claim:
        findings.add("preamble_dropped", f"{rest[:60]!r} stands before the first step and is left out")
    if not found:
        return None
    verdict = _read_verdict(preamble[found[-1].end() :], "`Label:` before the first step", findings)
    if verdict is None:
        return None
    findings.add("label_prefix", f"`Label: {verdict.value}` before the first step is read as the label")
    return verdict


def _drop_episode_tail(step: RawStep, findings: RowFindings) -> RawStep:
    """Removes the environment's answer to Finish: `Episode finished, reward = …`, or an empty one."""
    if step.observation is None or not _is_finish(step) or not _TAIL.fullmatch(step.observation.strip()):
        return step
    findings.add("episode_tail", "the observation behind Finish only says that the episode ended; it is left out")
    return replace(step, observation=None)


def _is_finish(step: RawStep) -> bool:
    return step.action is not None and _FINISH.fullmatch(step.action.strip()) is not None


def _end_with_finish(steps: list[RawStep], stated: Verdict | None, findings: RowFindings) -> list[RawStep]:
    """The steps with an ending: their own Finish if it has a verdict, else a Finish with the stated verdict."""
    last = steps[-1]
    if _is_finish(last):
        return [*steps[:-1], _correct_finish(last, stated, findings)]
    if last.action is None and last.observation is not None:
        raise _build_no_action(len(steps))
    if last.action is not None and is_blank(last.observation or ""):
        return steps
    if stated is None:
        raise RefusedError("no_verdict", f"the row has neither Finish[…] nor a label that is a verdict; {_SPELL}")
    findings.add("finish_missing_with_label", f"the steps stop without Finish; Finish[{stated.value}] is added")
    if last.action is None:
        thought = _drop_stray_bracket(last.thought or "", findings)
        return [*steps[:-1], RawStep(thought, f"Finish[{stated.value}]", None)]
    return [*steps, RawStep("", f"Finish[{stated.value}]", None)]


def _correct_finish(last: RawStep, stated: Verdict | None, findings: RowFindings) -> RawStep:
    match = _FINISH.fullmatch((last.action or "").strip())
    argument = to_one_line((match.group(1) if match else "") or "")
    verdict = parse_verdict(argument)
    if verdict is None:
        return replace(last, action=f"Finish[{_use_stated_verdict(argument, stated, findings).value}]")
    if stated is not None and verdict is not stated:
        raise _build_mismatch(f"Finish says {verdict.value}", f"the label says {stated.value}")
    _note_spelling(argument, verdict, findings)
    return replace(last, action=f"Finish[{verdict.value}]")


def _use_stated_verdict(argument: str, stated: Verdict | None, findings: RowFindings) -> Verdict:
    said = f"Finish[{argument[:40]}] is no verdict"
    if stated is None:
        raise RefusedError("no_verdict", f"{said} and the row has no label that is one; {_SPELL}")
    findings.add("finish_done", f"{said}; the label {stated.value} takes its place")
    return stated


def _drop_stray_bracket(thought: str, findings: RowFindings) -> str:
    bare = thought.rstrip()
    if not bare.endswith("]") or bare.count("]") <= bare.count("["):
        return thought
    findings.add("stray_bracket", "the last thought ends in a `]` that nothing opened; it is left out")
    return bare[:-1]


def _build_no_action(number: int) -> RefusedError:
    return RefusedError("step_without_action", f"step {number} has no action; add `Action {number}: …`")


def _build_step(raw: RawStep, number: int, is_last: bool) -> Step:
    if raw.action is None or is_blank(raw.action):
        raise _build_no_action(number)
    if _is_finish(raw) and (not is_last or raw.observation is not None):
        raise RefusedError("finish_not_last", f"step {number} is Finish and something follows; cut it there")
    action = _read_action_text(raw.action, number)
    observation = to_one_line(raw.observation or "") or None
    if action.name is not ActionName.FINISH and observation is None:
        raise RefusedError("empty_observation", f"step {number}: {action.name} found nothing; add its observation")
    try:
        return Step(thought=to_one_line(raw.thought or ""), action=action, observation=observation)
    except ValidationError as error:
        raise RefusedError("bad_step", f"step {number}: {_get_first_message(error)}") from None


# Cached: half of a file's actions are one of three Finishes, and many pages are searched more than once.
_parse_action = lru_cache(1_024)(parse_action)


def _read_action_text(text: str, number: int) -> Action:
    try:
        return _parse_action(text)
    except ValidationError as error:
        raise RefusedError("bad_argument", f"step {number}: {_get_first_message(error)}") from None
    except ValueError as error:
        raise RefusedError("unknown_action", f"step {number}: {error}") from None


def _get_first_message(error: ValidationError) -> str:
    return str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")

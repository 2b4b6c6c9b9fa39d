"""Reads the three formats of a row's steps: ReAct text, structured `steps`, chat `messages`.

Each becomes raw steps. `app.domain.rows` then applies the rules about verdicts, endings and actions.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from app.domain.chat import SYSTEM_ROLES, ChatClaim, Message, find_chat_claim, starts_with_claim_marker
from app.domain.claims import STEP_MARKER, forbidden_character, is_blank
from app.domain.datasets import Columns, Finding, SourceRow, build_finding
from app.domain.react import RawStep, parse_steps
from app.domain.step_markers import number_markers, observation_text, remove_markup

STEP_KEYS = ("thought", "action", "observation")

_FORBIDDEN = re.compile("[\0\ud800-\udfff]")


class RefusedError(Exception):
    """A row is refused. `code` is the finding's code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(slots=True)
class RowFindings:
    """The findings of one row. Each code is added once."""

    line: int
    by_code: dict[str, Finding] = field(default_factory=dict)

    def add(self, code: str, message: str) -> None:
        self.by_code.setdefault(code, build_finding(self.line, code, message))


@dataclass(frozen=True, slots=True)
class RawTrajectory:
    """A row's claim, preamble and steps, not yet checked."""

    claim: ChatClaim
    preamble: str
    steps: list[RawStep]


def refuse_forbidden_character(text: str, where: str) -> None:
    """Raises RefusedError if `text` contains a NUL or a lone surrogate."""
    if _FORBIDDEN.search(text):
        raise RefusedError("forbidden_character", f"{where} holds {forbidden_character(text)}; remove it")


def find_steps_column(row: SourceRow, columns: Columns) -> tuple[str, object]:
    """(name, value) of the column with the steps: the trajectories column if it has any, `steps`, or `messages`."""
    value = row.fields.get(columns.trajectories)
    if (isinstance(value, str) and not is_blank(value)) or (isinstance(value, list) and value):
        return columns.trajectories, value
    for name in ("steps", "messages"):
        if isinstance(row.fields.get(name), list):
            return name, row.fields[name]
    if value is not None and value != [] and not isinstance(value, str):
        return columns.trajectories, value
    return "", None


def read_raw_trajectory(value: object, source: str, findings: RowFindings) -> RawTrajectory:
    """The raw steps. Raises RefusedError if `value` has none of the three formats."""
    if isinstance(value, str):
        return _read_text(value, f"the column {source!r}", findings)
    if isinstance(value, list):
        chat = source == "messages" or all(isinstance(item, dict) and "role" in item for item in value)
        return (
            _read_messages(value, findings)
            if value and chat
            else RawTrajectory(ChatClaim(), "", _read_steps(value, findings))
        )
    if not source:
        raise RefusedError(
            "missing_trajectory", "the row has no trajectory; fill `trajectories`, `steps` or `messages`"
        )
    raise RefusedError("missing_trajectory", f"{source!r} holds neither a text nor a list of steps")


def _read_text(text: str, where: str, findings: RowFindings) -> RawTrajectory:
    refuse_forbidden_character(text, where)
    preamble, steps = parse_steps(
        _number_markers(_remove_markup(unicodedata.normalize("NFC", text), findings), findings)
    )
    if not steps:
        raise RefusedError("no_steps", f"{where} holds no step; write `Thought 1: … Action 1: … Observation 1: …`")
    return RawTrajectory(ChatClaim(), preamble, steps)


def _read_steps(items: list[object], findings: RowFindings) -> list[RawStep]:
    if not items:
        raise RefusedError("no_steps", "the list of steps is empty")
    return [_read_step(item, number, findings) for number, item in enumerate(items, start=1)]


def _read_step(item: object, number: int, findings: RowFindings) -> RawStep:
    if not isinstance(item, dict):
        raise RefusedError("bad_step", f"step {number} is not an object of thought, action and observation")
    if extra := sorted(repr(key)[:40] for key in item if key not in STEP_KEYS):
        findings.add("extra_key", f"step {number} has keys that are not read: {', '.join(extra[:5])}")
    thought, observation = item.get("thought"), item.get("observation")
    action = _action_text(item.get("action"))
    for name, text in zip(STEP_KEYS, (thought, action, observation), strict=True):
        if text is None:
            continue
        if not isinstance(text, str):
            raise RefusedError("bad_step", f"step {number}: {name} is not text")
        refuse_forbidden_character(text, f"step {number}: {name}")
        if marker := STEP_MARKER.search(text):
            raise RefusedError(
                "bad_step",
                f"step {number}: {name} holds {marker.group(0)!r}; structured steps hold no markers",
            )
    return RawStep(thought, action if isinstance(action, str) else None, observation)


def _action_text(action: object) -> object:
    match action:
        case {"name": str(name), "argument": str(argument)}:
            return f"{name}[{argument}]"
    return action


def _read_messages(items: list[object], findings: RowFindings) -> RawTrajectory:
    """Joins the assistant's messages. A message that answers an action is its observation."""
    messages = [_read_message(item, number) for number, item in enumerate(items, start=1)]
    first = next((index for index, message in enumerate(messages) if message.role == "assistant"), len(messages))
    written = _read_text("\n".join(_render_messages(messages[first:], findings)), "the assistant's messages", findings)
    return RawTrajectory(find_chat_claim(messages[:first]), written.preamble, written.steps)


def _render_messages(messages: list[Message], findings: RowFindings) -> Iterator[str]:
    """Yields the ReAct text of each message, from the first answer on."""
    follows_observation = False
    for message in messages:
        refuse_forbidden_character(message.text, f"message {message.number}")
        if message.role in SYSTEM_ROLES:
            findings.add("message_passed_over", f"message {message.number} ({message.role}) stands between steps")
            continue
        if message.role == "assistant":
            yield _render_answer(message, follows_observation, findings)
        else:
            yield _render_observation(message, findings)
        follows_observation = message.role != "assistant"


def _render_answer(message: Message, follows_observation: bool, findings: RowFindings) -> str:
    """The steps of an assistant's message. Text before the first marker is dropped: it would extend the observation."""
    text = _number_markers(_remove_markup(message.text, findings), findings)
    if not follows_observation or is_blank(text):
        return text
    marker = STEP_MARKER.search(text)
    if marker is None:
        findings.add("markers_numbered", f"message {message.number} names no step; it is read as a thought")
        return f"Thought {message.number}: {text}"
    if before := text[: marker.start()].strip():
        findings.add("preamble_dropped", f"{before[:60]!r} stands before a step and is left out")
    return text[marker.start() :]


def _render_observation(message: Message, findings: RowFindings) -> str:
    text = _remove_markup(message.text, findings)
    if message.role == "user" and starts_with_claim_marker(text):
        said = f"message {message.number} names another claim behind the first answer; give it a row of its own"
        raise RefusedError("ambiguous_claim", said)
    return text if STEP_MARKER.match(text.strip()) else f"Observation {message.number}: {observation_text(text)}"


def _remove_markup(text: str, findings: RowFindings) -> str:
    if (plain := remove_markup(text)) != text:
        findings.add(
            "markup_removed", "step markers stand in Markdown, such as `**Thought 1:**`; they are read without it"
        )
    return plain


def _number_markers(text: str, findings: RowFindings) -> str:
    if (numbered := number_markers(text)) != text:
        findings.add("markers_numbered", "`Thought:`, `Action:` and `Observation:` have no numbers; they are numbered")
    return numbered


def _read_message(item: object, number: int) -> Message:
    match item:
        case {"role": str(role), "content": str(content)}:
            return Message(number, role.strip().lower(), content)
        case {"role": str(role), "content": [*parts]}:
            texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
            if all(isinstance(text, str) for text in texts):
                return Message(number, role.strip().lower(), "\n".join(str(text) for text in texts))
    raise RefusedError("bad_messages", f"message {number} needs a `role` and a text as `content`")

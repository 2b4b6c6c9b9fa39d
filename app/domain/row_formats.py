"""The three shapes in which a row may hold its steps: text, structured `steps`, chat `messages`.

All of them become raw steps, so that the rules about verdicts, endings and actions exist once,
in `app.domain.rows`.
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
    """Why a row is not kept."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(slots=True)
class RowFindings:
    """The findings of one row so far; a code is noted once."""

    line: int
    by_code: dict[str, Finding] = field(default_factory=dict)

    def add(self, code: str, message: str) -> None:
        self.by_code.setdefault(code, build_finding(self.line, code, message))


@dataclass(frozen=True, slots=True)
class RawTrajectory:
    """A row's trajectory before anything about it is believed."""

    claim: ChatClaim
    preamble: str
    steps: list[RawStep]


def refuse_forbidden_character(text: str, where: str) -> None:
    """Refuses a NUL and a lone surrogate, which no text here may hold."""
    if _FORBIDDEN.search(text):
        raise RefusedError("forbidden_character", f"{where} holds {forbidden_character(text)}; remove it")


def find_steps_column(row: SourceRow, columns: Columns) -> tuple[str, object]:
    """The column that holds the steps: the trajectories column if it holds any, `steps`, or `messages`."""
    value = row.fields.get(columns.trajectories)
    if (isinstance(value, str) and not is_blank(value)) or (isinstance(value, list) and value):
        return columns.trajectories, value
    for name in ("steps", "messages"):
        if isinstance(row.fields.get(name), list):
            return name, row.fields[name]
    if value is not None and value != [] and not isinstance(value, str):
        return columns.trajectories, value
    return "", None


def read_raw_trajectory(value: object, source: str, notes: RowFindings) -> RawTrajectory:
    """The steps as raw text. Raises RefusedError for what has none of the three shapes."""
    if isinstance(value, str):
        return _from_text(value, f"the column {source!r}", notes)
    if isinstance(value, list):
        chat = source == "messages" or all(isinstance(item, dict) and "role" in item for item in value)
        return (
            _from_messages(value, notes)
            if value and chat
            else RawTrajectory(ChatClaim(), "", _from_steps(value, notes))
        )
    if not source:
        raise RefusedError(
            "missing_trajectory", "the row has no trajectory; fill `trajectories`, `steps` or `messages`"
        )
    raise RefusedError("missing_trajectory", f"{source!r} holds neither a text nor a list of steps")


def _from_text(text: str, where: str, notes: RowFindings) -> RawTrajectory:
    refuse_forbidden_character(text, where)
    preamble, steps = parse_steps(_numbered(_plain(unicodedata.normalize("NFC", text), notes), notes))
    if not steps:
        raise RefusedError("no_steps", f"{where} holds no step; write `Thought 1: … Action 1: … Observation 1: …`")
    return RawTrajectory(ChatClaim(), preamble, steps)


def _from_steps(items: list[object], notes: RowFindings) -> list[RawStep]:
    if not items:
        raise RefusedError("no_steps", "the list of steps is empty")
    return [_raw_step(item, number, notes) for number, item in enumerate(items, start=1)]


def _raw_step(item: object, number: int, notes: RowFindings) -> RawStep:
    if not isinstance(item, dict):
        raise RefusedError("bad_step", f"step {number} is no object of thought, action and observation")
    if extra := sorted(repr(key)[:40] for key in item if key not in STEP_KEYS):
        notes.add("extra_key", f"step {number} has keys that are not read: {', '.join(extra[:5])}")
    thought, observation = item.get("thought"), item.get("observation")
    action = _action_text(item.get("action"))
    for name, text in zip(STEP_KEYS, (thought, action, observation), strict=True):
        if text is None:
            continue
        if not isinstance(text, str):
            raise RefusedError("bad_step", f"step {number}: {name} is no text")
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


def _from_messages(items: list[object], notes: RowFindings) -> RawTrajectory:
    """The assistant's texts joined; what answers an action is its observation unless it says so itself."""
    messages = [_message(item, number) for number, item in enumerate(items, start=1)]
    first = next((place for place, message in enumerate(messages) if message.role == "assistant"), len(messages))
    written = _from_text("\n".join(_pieces(messages[first:], notes)), "the assistant's messages", notes)
    return RawTrajectory(find_chat_claim(messages[:first]), written.preamble, written.steps)


def _pieces(messages: list[Message], notes: RowFindings) -> Iterator[str]:
    """What each message from the first answer on adds to the trajectory's text."""
    follows_observation = False
    for message in messages:
        refuse_forbidden_character(message.text, f"message {message.number}")
        if message.role in SYSTEM_ROLES:
            notes.add("message_passed_over", f"message {message.number} ({message.role}) stands between steps")
            continue
        if message.role == "assistant":
            yield _answer(message, follows_observation, notes)
        else:
            yield _observation(message, notes)
        follows_observation = message.role != "assistant"


def _answer(message: Message, follows_observation: bool, notes: RowFindings) -> str:
    """An answer's steps. Text before them would become a part of the observation that it follows."""
    text = _numbered(_plain(message.text, notes), notes)
    if not follows_observation or is_blank(text):
        return text
    marker = STEP_MARKER.search(text)
    if marker is None:
        notes.add("markers_numbered", f"message {message.number} names no step; it is read as a thought")
        return f"Thought {message.number}: {text}"
    if before := text[: marker.start()].strip():
        notes.add("preamble_dropped", f"{before[:60]!r} stands before a step and is left out")
    return text[marker.start() :]


def _observation(message: Message, notes: RowFindings) -> str:
    text = _plain(message.text, notes)
    if message.role == "user" and starts_with_claim_marker(text):
        said = f"message {message.number} names another claim behind the first answer; give it a row of its own"
        raise RefusedError("ambiguous_claim", said)
    return text if STEP_MARKER.match(text.strip()) else f"Observation {message.number}: {observation_text(text)}"


def _plain(text: str, notes: RowFindings) -> str:
    if (plain := remove_markup(text)) != text:
        notes.add(
            "markup_removed", "step markers stand in Markdown, such as `**Thought 1:**`; they are read without it"
        )
    return plain


def _numbered(text: str, notes: RowFindings) -> str:
    if (numbered := number_markers(text)) != text:
        notes.add("markers_numbered", "`Thought:`, `Action:` and `Observation:` have no numbers; they are numbered")
    return numbered


def _message(item: object, number: int) -> Message:
    match item:
        case {"role": str(role), "content": str(content)}:
            return Message(number, role.strip().lower(), content)
        case {"role": str(role), "content": [*parts]}:
            texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
            if all(isinstance(text, str) for text in texts):
                return Message(number, role.strip().lower(), "\n".join(str(text) for text in texts))
    raise RefusedError("bad_messages", f"message {number} needs a `role` and a text as `content`")

"""Parses a JSON document as a TrainSpec. Reports every mistake with its path and a did-you-mean hint."""

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from app.domain.claims import forbidden_character
from app.domain.errors import InvalidError, Loc, NotYetSupportedError, Problem
from app.domain.react import unfilled_placeholders
from app.domain.spec_base import SPEC_CODES
from app.domain.specs import JobKind, TrainSpec, not_yet_supported
from app.domain.spelling import LONGEST_WORD, did_you_mean, find_correction, normalise_word
from app.domain.vocabularies import FOREIGN_KEYS, ForeignKey, find_foreign_key

MAX_PROBLEMS = 100
"""Most problems that are reported. A document of a mebibyte can contain a hundred thousand unknown keys."""

MAX_PLACEHOLDERS_NAMED = 5

_MESSAGES = {
    "dict_type": "a section is needed here: keys with values",
    "model_attributes_type": "a section is needed here, such as {type: lora}",
    "model_type": "a section is needed here: keys with values",
    "tuple_type": "a list is needed here",
}
"""Messages for pydantic's error types whose own messages name Python types."""


ROUTES_OF_OTHER_KINDS: dict[str, str] = {
    JobKind.EVALUATE: "POST /evaluations",
    JobKind.SYNTHESIZE: "POST /datasets/synthesize",
    JobKind.REGROUND: "POST /datasets/{dataset}/reground",
}


def read_spec(data: Any) -> TrainSpec:
    """The spec in `data`.

    Raises InvalidError with every problem, or NotYetSupportedError for valid but unsupported options.
    """
    if not isinstance(data, dict):
        raise InvalidError("a job's config is a JSON object", code="invalid_spec")
    reject_forbidden(data)
    kind = data.get("kind")
    if kind not in (None, JobKind.TRAIN):
        raise _build_kind_error(kind)
    try:
        spec = TrainSpec.model_validate(data)
    except ValidationError as error:
        items = error.errors(include_url=False)
        found = list_problems(items, data, TrainSpec)
        code = next((item["type"] for item in items if item["type"] in SPEC_CODES), "invalid_spec")
        raise InvalidError(build_headline(found), code=code, problems=found) from None
    _reject_unfilled(spec.prompt.template)
    if missing := not_yet_supported(spec):
        found = tuple(
            Problem(path, f"{what} is understood, but this version does not run it yet") for path, what in missing
        )
        raise NotYetSupportedError(build_headline(found), problems=found)
    return spec


def _reject_unfilled(template: str) -> None:
    """Checked here and not in the model, so that stored jobs with such a template can still be loaded."""
    if not (unfilled := unfilled_placeholders(template)):
        return
    names = ", ".join(one[:LONGEST_WORD] for one in unfilled[:MAX_PLACEHOLDERS_NAMED])
    message = f"nothing fills the placeholder {names}"
    problem = Problem(("prompt", "template"), message, "only {claim} is filled, in single braces; remove the others")
    raise InvalidError(build_headline((problem,)), code="invalid_spec", problems=(problem,))


def _build_kind_error(kind: Any) -> InvalidError:
    known = [member.value for member in JobKind]
    if route := ROUTES_OF_OTHER_KINDS.get(str(kind)):
        message = f"a job of kind {kind} is submitted with {route}"
        return InvalidError(message, code="invalid_spec", problems=(Problem(("kind",), message),))
    if kind in known:
        message = f"this version does not run jobs of kind {kind}; it runs train"
        return NotYetSupportedError(message, problems=(Problem(("kind",), message),))
    problem = Problem(("kind",), f"{str(kind)[:LONGEST_WORD]!r} is no kind of job", did_you_mean(str(kind), known))
    return InvalidError(build_headline((problem,)), code="invalid_spec", problems=(problem,))


def list_problems(
    items: Sequence[Mapping[str, Any]], data: Any, model: type[BaseModel] | None = None
) -> tuple[Problem, ...]:
    """Turns pydantic's errors about `data` into problems, one for each path, at most `MAX_PROBLEMS`.

    `model`: the model that validated `data`. With it, unknown keys get a did-you-mean hint.
    """
    found: dict[Loc, Problem] = {}
    for item in filter(_is_informative(items[:MAX_PROBLEMS]), items[:MAX_PROBLEMS]):
        problem = _build_problem(item, data, model)
        known = found.get(problem.loc)
        found[problem.loc] = replace(known, message=f"{known.message}; or {problem.message}") if known else problem
    return tuple(found.values())


def _is_informative(items: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], bool]:
    """Drops "too short" for a list whose members were refused: pydantic counts only the remaining members."""
    inside = {tuple(item["loc"][:end]) for item in items for end in range(len(item["loc"]))}
    return lambda item: item["type"] != "too_short" or tuple(item["loc"]) not in inside


def _build_problem(item: Mapping[str, Any], data: Any, model: type[BaseModel] | None) -> Problem:
    loc: Loc = tuple(item["loc"])
    context = item.get("ctx", {})
    inside = tuple(context.get("path", ()))
    path = _to_path(loc, data, whole=bool(inside)) + inside
    match item["type"]:
        case "extra_forbidden":
            return _build_unknown_key(loc, path, model)
        case "union_tag_invalid" if context["tag"] == "None":  # pydantic gives the tag as text
            return Problem((*path, "type"), "the type is missing")
        case "union_tag_invalid":
            expected = context["expected_tags"]
            known = [tag.strip(" '") for tag in expected.split(",")]
            message = f"{str(context['tag'])[:LONGEST_WORD]!r} is none of {expected}"
            return Problem((*path, "type"), message, did_you_mean(str(context["tag"]), known))
        case "union_tag_not_found":
            return Problem((*path, "type"), "the type is missing")
        case _:
            return Problem(path, _build_message(item))


def _build_unknown_key(loc: Loc, path: Loc, model: type[BaseModel] | None) -> Problem:
    word = str(loc[-1])
    message = f"there is no key {word[:LONGEST_WORD]!r} here"
    if model is None:
        return Problem(path, message)
    known = sorted(_list_keys_at(model, loc[:-1]))
    return Problem(path, message, _build_hint(word, path, known, model) or f"known here: {', '.join(known)}")


def _build_hint(word: str, path: Loc, known: Sequence[str], model: type[BaseModel]) -> str | None:
    """Tries in turn: a key of another trainer, a misspelt key of ours, a misspelt key of another trainer."""
    nested = _list_nested_keys(model)
    everywhere = [*model.model_fields, *nested]
    section = str(path[-2]) if len(path) > 1 else ""
    if hint := _build_foreign_hint(find_foreign_key(word, section), path, known, everywhere):
        return hint
    if close := find_correction(word, known) or find_correction(word, nested):
        return f"did you mean {close!r}?"
    if any(normalise_word(word) == normalise_word(name.rpartition(".")[2]) for name in nested):
        return None  # several sections have this key
    theirs = find_correction(word, (name for name in FOREIGN_KEYS if "." not in name))
    return _build_foreign_hint(FOREIGN_KEYS[theirs], path, known, everywhere) if theirs else None


def _build_foreign_hint(
    meaning: ForeignKey | None, path: Loc, known: Sequence[str], everywhere: Sequence[str]
) -> str | None:
    """The hint for another trainer's key, if our key for it is allowed here.

    Not every adapter has a rank, for example.
    """
    if meaning is None:
        return None
    if meaning.key is None:
        return meaning.note if "trainer" in everywhere else None
    parent, _, name = meaning.key.rpartition(".")
    here = parent == ".".join(map(str, path[:-1]))
    if meaning.key not in everywhere or (here and name not in known):
        return None
    note = f" {meaning.note[0].upper()}{meaning.note[1:]}" if meaning.note else ""
    return f"did you mean {meaning.key!r}?{note}"


def _to_path(loc: Loc, data: Any, *, whole: bool) -> Loc:
    """`loc` as a path into `data`, without the names of union members that pydantic inserts.

    `whole`: `loc` is an object's path, so its last part may also be a union member's name."""
    path: list[str | int] = []
    for number, part in enumerate(loc):
        if isinstance(data, dict) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif whole or number + 1 < len(loc) or not isinstance(data, dict):
            continue
        path.append(part)
    return tuple(path)


def _build_message(item: Mapping[str, Any]) -> str:
    message = _MESSAGES.get(item["type"], str(item["msg"]).removeprefix("Value error, "))
    given = item.get("input")
    if isinstance(given, str | int | float | bool) and item["type"] not in ("missing", "value_error"):
        return f"{message} (given: {str(given)[:LONGEST_WORD]!r})"
    return message


def build_headline(found: Sequence[Problem]) -> str:
    first = found[0]
    path = ".".join(str(part) for part in first.loc) or "the document"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    hint = f"; {first.hint}" if first.hint else ""
    return f"{path}: {first.message}{hint}{more}"


def _list_keys_at(model: type[BaseModel], loc: Loc) -> set[str]:
    """The keys that are known at `loc`, which may contain tags of unions and indices of lists."""
    here: list[Any] = [model]
    for part in loc:
        models = _models(here)
        tagged = [m for m in models if _get_tag(m) == part]
        here = tagged or [m.model_fields[str(part)].annotation for m in models if str(part) in m.model_fields] or models
    return {name for m in _models(here) for name in m.model_fields}


@cache
def _list_nested_keys(model: type[BaseModel]) -> tuple[str, ...]:
    """Dotted names of the keys below the top level, such as `trainer.epochs`."""
    names: dict[str, None] = {}
    for field, info in model.model_fields.items():
        for inner in _models([info.annotation]):
            names |= dict.fromkeys(f"{field}.{name}" for name in (*inner.model_fields, *_list_nested_keys(inner)))
    return tuple(names)


def _models(annotations: list[Any]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        else:
            found += _models(list(typing.get_args(annotation)))
    return found


def _get_tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    values = typing.get_args(field.annotation) if field else ()
    return str(values[0]) if len(values) == 1 else None


def reject_forbidden(value: Any, loc: Loc = ()) -> None:
    """Raises InvalidError if any string in a JSON document contains a NUL or a lone surrogate."""
    stack: list[tuple[Loc, Any]] = [(loc, value)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, dict):
            stack += [((*path, key), member) for key, member in item.items()]
            stack += [(path, key) for key in item]
        elif isinstance(item, list):
            stack += [((*path, index), member) for index, member in enumerate(item)]
        elif isinstance(item, str) and (bad := forbidden_character(item)):
            problem = Problem(path, f"the text holds {bad}", "remove it and send again")
            raise InvalidError(f"a string holds {bad}", code="forbidden_character", problems=(problem,))

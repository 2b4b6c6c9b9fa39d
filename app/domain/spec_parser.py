"""A JSON document → a TrainSpec, with every mistake named by its place and a did-you-mean. No silence."""

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
"""Findings that are put into words: a document of a mebibyte can hold a hundred thousand unknown keys."""

MOST_NAMED = 5

_IN_PLAIN_WORDS = {
    "dict_type": "a section is needed here: keys with values",
    "model_attributes_type": "a section is needed here, such as {type: lora}",
    "model_type": "a section is needed here: keys with values",
    "tuple_type": "a list is needed here",
}
"""pydantic's error types whose own message names types of Python."""


def read_spec(data: Any) -> TrainSpec:
    """The spec in `data`. InvalidError lists every problem; NotYetSupportedError what parses but does not run yet."""
    if not isinstance(data, dict):
        raise InvalidError("a job's config is a JSON object", code="invalid_spec")
    reject_forbidden(data)
    kind = data.get("kind")
    if kind not in (None, JobKind.TRAIN):
        raise _other_kind(kind)
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
            Problem(place, f"{what} is understood, but this version does not run it yet") for place, what in missing
        )
        raise NotYetSupportedError(build_headline(found), problems=found)
    return spec


def _reject_unfilled(template: str) -> None:
    """Here and not in the model: a job that was stored with such a template can still be read."""
    if not (unfilled := unfilled_placeholders(template)):
        return
    message = f"nothing fills the placeholder {', '.join(one[:LONGEST_WORD] for one in unfilled[:MOST_NAMED])}"
    problem = Problem(("prompt", "template"), message, "only {claim} is filled, in single braces; remove the others")
    raise InvalidError(build_headline((problem,)), code="invalid_spec", problems=(problem,))


def _other_kind(kind: Any) -> InvalidError:
    known = [member.value for member in JobKind]
    if kind in known:
        message = f"jobs of kind {kind} are not run by this version; train is"
        return NotYetSupportedError(message, problems=(Problem(("kind",), message),))
    problem = Problem(("kind",), f"{str(kind)[:LONGEST_WORD]!r} is no kind of job", did_you_mean(str(kind), known))
    return InvalidError(build_headline((problem,)), code="invalid_spec", problems=(problem,))


def list_problems(
    items: Sequence[Mapping[str, Any]], data: Any, model: type[BaseModel] | None = None
) -> tuple[Problem, ...]:
    """pydantic's findings about `data` in this project's words, one for each place, at most `MAX_PROBLEMS`.

    With `model`, which `data` was read as, unknown keys get a did-you-mean.
    """
    found: dict[Loc, Problem] = {}
    for item in filter(_says_something(items[:MAX_PROBLEMS]), items[:MAX_PROBLEMS]):
        problem = _problem(item, data, model)
        known = found.get(problem.loc)
        found[problem.loc] = replace(known, message=f"{known.message}; or {problem.message}") if known else problem
    return tuple(found.values())


def _says_something(items: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], bool]:
    """Not so "too short" of a list whose members were all refused: it tells of the members left after that."""
    inside = {tuple(item["loc"][:end]) for item in items for end in range(len(item["loc"]))}
    return lambda item: item["type"] != "too_short" or tuple(item["loc"]) not in inside


def _problem(item: Mapping[str, Any], data: Any, model: type[BaseModel] | None) -> Problem:
    loc: Loc = tuple(item["loc"])
    context = item.get("ctx", {})
    inside = tuple(context.get("place", ()))
    place = _place(loc, data, whole=bool(inside)) + inside
    match item["type"]:
        case "extra_forbidden":
            return _unknown_key(loc, place, model)
        case "union_tag_invalid" if context["tag"] == "None":  # pydantic gives the tag as text
            return Problem((*place, "type"), "the type is missing")
        case "union_tag_invalid":
            expected = context["expected_tags"]
            known = [tag.strip(" '") for tag in expected.split(",")]
            message = f"{str(context['tag'])[:LONGEST_WORD]!r} is none of {expected}"
            return Problem((*place, "type"), message, did_you_mean(str(context["tag"]), known))
        case "union_tag_not_found":
            return Problem((*place, "type"), "the type is missing")
        case _:
            return Problem(place, _sentence(item))


def _unknown_key(loc: Loc, place: Loc, model: type[BaseModel] | None) -> Problem:
    word = str(loc[-1])
    message = f"there is no key {word[:LONGEST_WORD]!r} here"
    if model is None:
        return Problem(place, message)
    known = sorted(_fields_at(model, loc[:-1]))
    return Problem(place, message, _hint(word, place, known, model) or f"known here: {', '.join(known)}")


def _hint(word: str, place: Loc, known: Sequence[str], model: type[BaseModel]) -> str | None:
    """What was meant: a word of another trainer first, then a misspelt one of ours, then a misspelt one of theirs."""
    nested = _nested(model)
    everywhere = [*model.model_fields, *nested]
    section = str(place[-2]) if len(place) > 1 else ""
    if hint := _said(find_foreign_key(word, section), place, known, everywhere):
        return hint
    if close := find_correction(word, known) or find_correction(word, nested):
        return f"did you mean {close!r}?"
    if any(normalise_word(word) == normalise_word(name.rpartition(".")[2]) for name in nested):
        return None  # several sections have this key
    theirs = find_correction(word, (name for name in FOREIGN_KEYS if "." not in name))
    return _said(FOREIGN_KEYS[theirs], place, known, everywhere) if theirs else None


def _said(meaning: ForeignKey | None, place: Loc, known: Sequence[str], everywhere: Sequence[str]) -> str | None:
    """The hint for a word of others, where this document can have our key for it: not every adapter has a rank."""
    if meaning is None:
        return None
    if meaning.key is None:
        return meaning.note if "trainer" in everywhere else None
    parent, _, name = meaning.key.rpartition(".")
    here = parent == ".".join(map(str, place[:-1]))
    if meaning.key not in everywhere or (here and name not in known):
        return None
    note = f" {meaning.note[0].upper()}{meaning.note[1:]}" if meaning.note else ""
    return f"did you mean {meaning.key!r}?{note}"


def _place(loc: Loc, data: Any, *, whole: bool) -> Loc:
    """`loc` as a path into `data`: without the names of union members that pydantic puts in between.

    `whole`: it is that of an object and no key of it, so that the last part may be such a name too."""
    place: list[str | int] = []
    for number, part in enumerate(loc):
        if isinstance(data, dict) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif whole or number + 1 < len(loc) or not isinstance(data, dict):
            continue
        place.append(part)
    return tuple(place)


def _sentence(item: Mapping[str, Any]) -> str:
    message = _IN_PLAIN_WORDS.get(item["type"], str(item["msg"]).removeprefix("Value error, "))
    given = item.get("input")
    if isinstance(given, str | int | float | bool) and item["type"] not in ("missing", "value_error"):
        return f"{message} (given: {str(given)[:LONGEST_WORD]!r})"
    return message


def build_headline(found: Sequence[Problem]) -> str:
    first = found[0]
    place = ".".join(str(part) for part in first.loc) or "the document"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    hint = f"; {first.hint}" if first.hint else ""
    return f"{place}: {first.message}{hint}{more}"


def _fields_at(model: type[BaseModel], loc: Loc) -> set[str]:
    """The keys that are known at a place. Tags of unions and positions in lists stand in `loc` too."""
    here: list[Any] = [model]
    for part in loc:
        models = _models(here)
        tagged = [m for m in models if _tag(m) == part]
        here = tagged or [m.model_fields[str(part)].annotation for m in models if str(part) in m.model_fields] or models
    return {name for m in _models(here) for name in m.model_fields}


@cache
def _nested(model: type[BaseModel]) -> tuple[str, ...]:
    """Dotted names of the keys below the top one, such as `trainer.epochs`."""
    names: dict[str, None] = {}
    for field, info in model.model_fields.items():
        for inner in _models([info.annotation]):
            names |= dict.fromkeys(f"{field}.{name}" for name in (*inner.model_fields, *_nested(inner)))
    return tuple(names)


def _models(annotations: list[Any]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        else:
            found += _models(list(typing.get_args(annotation)))
    return found


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    values = typing.get_args(field.annotation) if field else ()
    return str(values[0]) if len(values) == 1 else None


def reject_forbidden(value: Any, loc: Loc = ()) -> None:
    """InvalidError when any string in a JSON document holds a NUL or a lone surrogate."""
    stack: list[tuple[Loc, Any]] = [(loc, value)]
    while stack:
        place, item = stack.pop()
        if isinstance(item, dict):
            stack += [((*place, key), member) for key, member in item.items()]
            stack += [(place, key) for key in item]
        elif isinstance(item, list):
            stack += [((*place, index), member) for index, member in enumerate(item)]
        elif isinstance(item, str) and (bad := forbidden_character(item)):
            problem = Problem(place, f"the text holds {bad}", "remove it and send again")
            raise InvalidError(f"a string holds {bad}", code="forbidden_character", problems=(problem,))

"""A JSON document → a JobSpec, with every mistake named by its place and a did-you-mean. No silence."""

import difflib
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from app.domain.claims import forbidden_character
from app.domain.errors import InvalidError, Loc, NotYetSupportedError, Problem
from app.domain.specs import JobKind, TrainSpec, not_yet_supported

_LUDWIG_DIFFERS = {
    ("quantization", "bnb_4bit_compute_dtype"): "the compute type follows the device; leave it out",
    ("quantization", "bnb_4bit_quant_type"): "write quant_type",
    ("quantization", "bnb_4bit_use_double_quant"): "write double_quant",
    ("trainer", "max_batch_size"): "batch_size auto is bounded by tokens; leave it out",
    ("preprocessing", "sample_ratio"): "upload the rows that you want; every row is used",
}


def read_spec(data: Any) -> TrainSpec:
    """The spec in `data`. InvalidError lists every problem; NotYetSupportedError what parses but does not run yet."""
    if not isinstance(data, dict):
        raise InvalidError("a job's config is a JSON object", code="invalid_spec")
    reject_forbidden(data)
    kind = data.get("kind", JobKind.TRAIN)
    if kind != JobKind.TRAIN:
        raise _other_kind(kind)
    try:
        spec = TrainSpec.model_validate(data)
    except ValidationError as error:
        found = problems(error, TrainSpec)
        raise InvalidError(_headline(found), code="invalid_spec", problems=found) from None
    if missing := not_yet_supported(spec):
        found = tuple(
            Problem(place, f"{what} is understood, but this version does not run it yet") for place, what in missing
        )
        raise NotYetSupportedError(_headline(found), problems=found)
    return spec


def _other_kind(kind: Any) -> InvalidError:
    known = [member.value for member in JobKind]
    if kind in known:
        message = f"jobs of kind {kind} are not run by this version; train is"
        return NotYetSupportedError(message, problems=(Problem(("kind",), message),))
    problem = Problem(("kind",), f"{str(kind)[:60]!r} is no kind of job", _did_you_mean(str(kind), known))
    return InvalidError(_headline((problem,)), code="invalid_spec", problems=(problem,))


def problems(error: ValidationError, model: type[BaseModel] | None = None) -> tuple[Problem, ...]:
    """pydantic's findings in this project's words; with `model`, unknown keys get a did-you-mean."""
    return tuple(_problem(dict(item), model) for item in error.errors(include_url=False))


def _problem(item: dict[str, Any], model: type[BaseModel] | None) -> Problem:
    loc: Loc = tuple(item["loc"])
    if item["type"] != "extra_forbidden":
        return Problem(loc, _sentence(item))
    known = list(_fields_at(model, loc[:-1])) if model else []
    ours = _LUDWIG_DIFFERS.get((str(loc[-2]) if len(loc) > 1 else "", str(loc[-1])))
    hint = ours or _did_you_mean(str(loc[-1]), known)
    return Problem(loc, f"there is no key {str(loc[-1])[:60]!r} here", hint)


def _sentence(item: dict[str, Any]) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    given = item.get("input")
    if isinstance(given, str | int | float | bool) and item["type"] not in ("missing", "value_error"):
        return f"{message} (given: {str(given)[:60]!r})"
    return message


def _did_you_mean(word: str, known: list[str]) -> str | None:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known here: {', '.join(sorted(known))}" if known else None


def _headline(found: tuple[Problem, ...]) -> str:
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
